"""Classes that a config names by their module: data sources and tasks."""

import importlib
import pkgutil

from jaxvid.errors import UserError, shown


def find(package: str, name: str, interface: type) -> type:
    """The class of the module <package>.<name> that is called as its interface.

    Raises UserError about the field `name`, with the names that there are.
    """
    found = _find(package, name, interface)
    if found is None:
        modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
        names = [module.name for module in modules if _find(package, module.name, interface)]
        raise UserError(f"name={shown(name)}: unknown; use one of {', '.join(names)}")
    return found


def _find(package, name, interface):
    """The class, or None."""
    if not isinstance(name, str) or not name.isidentifier():
        return None
    path = f"{package}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):  # an import in the module fails
            raise
        return None
    found = vars(module).get(interface.__name__)
    return None if found is interface else found
