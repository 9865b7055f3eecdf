"""Stand-in, for imports only: see inert_modules.py."""

from inert_modules import stand_in

stand_in(__name__, "0.28.0")
