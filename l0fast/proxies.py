"""The way to a service of the internet, where it leads through a company's or a cluster's proxy.

As everybody's: HTTPS_PROXY of the environment names it, NO_PROXY who is reached without. What is asked in plain http is of our
own network, and asked straight; so is this machine.
"""

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from l0fast.errors import UsageError


def proxy_of(url: str) -> str | None:
    """The proxy that an address is reached by, None for none. Raises UsageError for one that can't be used."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = getproxies().get("https")
    if parts.scheme != "https" or not proxy or is_loopback(host) or proxy_bypass(parts.netloc):
        return None
    # the usual ones may be left out
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        good = urlsplit(proxy).scheme in ("http", "https") and urlsplit(proxy).hostname and urlsplit(proxy).port != 0
    except ValueError:
        good = False
    if not good:
        # not the rest of it, where a password may be
        raise UsageError(
            f"HTTPS_PROXY begins with {proxy.partition('://')[0]}:// and is no address of an HTTP proxy: name one like "
            f"http://proxy:3128, or {host} in NO_PROXY to reach it without"
        )
    return proxy


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its address, or by the one name that is it everywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
