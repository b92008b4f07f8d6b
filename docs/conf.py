"""Sphinx configuration, and the check that every public name is documented."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.inspect import stringify_signature

import mfac_jax

project = "mfac_jax"
author = "The mfac_jax authors"
project_copyright = author
release = version = mfac_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"mfac_jax {release}"

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
maximum_signature_line_length = 80
napoleon_attr_annotations = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True

# A reference into this package must resolve. Types in signatures are rarely worth a link, and the
# build does not read other projects' pages.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(?!mfac_jax\.).*|mfac_jax\.(.+\.)?_.*"),
    ("py:.*", r"(jax|numpy|optax|flax|orbax)\..*"),
]

logger = logging.getLogger(__name__)


def public_modules() -> Iterator[ModuleType]:
    """The package and every module in it without a leading underscore."""
    yield mfac_jax
    for info in pkgutil.walk_packages(mfac_jax.__path__, "mfac_jax."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            yield importlib.import_module(info.name)


def public_names(module: ModuleType) -> list[str]:
    """``__all__``, or the functions and classes that are defined in the module."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if name != "__version__"]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


def resolve(name: str) -> Any:
    """The function, class or module of that name; None for anything else."""
    try:
        value = pkgutil.resolve_name(name)
    except (AttributeError, ImportError, ValueError):
        return None
    return value if callable(value) or inspect.ismodule(value) else None


def documented(env: BuildEnvironment) -> dict[int, str]:
    """The name under which each documented function, class or module is found, by id."""
    names = [entry[0] for entry in env.domains["py"].get_objects()]
    return {id(value): name for name in names if (value := resolve(name)) is not None}


def check_all_public_names_are_documented(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns about every public name that no page describes. A warning fails the build."""
    names = {entry[0] for entry in env.domains["py"].get_objects()}
    objects = documented(env)
    for module in public_modules():
        for name in public_names(module):
            full = f"{module.__name__}.{name}"
            if full not in names and id(getattr(module, name)) not in objects:
                logger.warning("%s is public and on no page; add it to docs/api", full)


def follow_reexport(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element
) -> Element | None:
    """Links a re-export such as `mfac_jax.fisher_inverse` to where the function is documented."""
    name = documented(env).get(id(resolve(node["reftarget"])))
    if name is None or node.get("refdomain") != "py":
        return None
    python = env.domains["py"]
    kind, page = node["reftype"], node["refdoc"]
    return python.resolve_xref(env, page, app.builder, kind, name, node, content)


def sign_as_written(
    app: Sphinx, what: str, name: str, obj: Any, options: object, args: str, returns: str
) -> tuple[str, str] | None:
    """Signatures with the annotations of the source, such as `ArrayLike`, not their expansion."""
    if not inspect.isfunction(obj):
        return None
    signature = inspect.signature(obj)
    parameters = list(signature.parameters.values())
    if what == "method":
        parameters = parameters[1:]
    text = stringify_signature(signature.replace(parameters=parameters))
    args, _, returns = text.partition(" -> ")
    return args, returns


def skip_field(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object
) -> bool | None:
    """Omits the fields of a NamedTuple, because its ``Attributes`` section describes them."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", sign_as_written)
    app.connect("autodoc-skip-member", skip_field)
    app.connect("missing-reference", follow_reexport)
    app.connect("env-check-consistency", check_all_public_names_are_documented)
