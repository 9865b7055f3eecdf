"""Modules that can be imported and do nothing: enough for SGLang's imports on a machine without its GPU packages.

`stand_in(name)` makes that module one: whatever is looked up in it can be looked into further, and raises
NotImplementedError when it is called. No operator is registered with torch, so nothing takes them for the real thing.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_NAMES: set[str] = set()


class _Inert(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *args: object, **kwargs: object) -> object:
        raise NotImplementedError(f"{cls.__name__}: this machine has a stand-in only")


class _Submodules(MetaPathFinder, Loader):
    def find_spec(self, fullname, path=None, target=None):
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in _NAMES else None

    def exec_module(self, module: ModuleType) -> None:
        _make_inert(module)


def stand_in(name: str, version: str) -> None:
    _NAMES.add(name)
    _make_inert(sys.modules[name])
    sys.modules[name].__version__ = version
    if not any(isinstance(finder, _Submodules) for finder in sys.meta_path):
        sys.meta_path.append(_Submodules())


def _make_inert(module: ModuleType) -> None:
    module.__path__ = []
    inert = _Inert(module.__name__, (), {})
    module.__getattr__ = lambda name: getattr(inert, name)  # type: ignore[method-assign]
