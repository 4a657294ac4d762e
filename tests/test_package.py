"""The package as its users meet it: names, docstrings, types, pages."""

import importlib
import inspect
import pkgutil
import pydoc

import pytest

import glassgpt

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(glassgpt.__path__, "glassgpt.")
)


def module(name):
    """A module by its full name; `glassgpt.softmax` itself may be the function."""
    return importlib.import_module(name)


def defined_in(name):
    """The public functions and classes that a module defines itself."""
    return {
        key: value
        for key, value in vars(module(name)).items()
        if not key.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == name
    }


def public_functions(name):
    """(qualified name, function) for a module's functions and its classes' methods."""
    for key, value in defined_in(name).items():
        if inspect.isfunction(value):
            yield key, value
            continue
        for method, content in vars(value).items():
            content = getattr(content, "__func__", content)
            content = getattr(content, "fget", content)
            written = inspect.isfunction(content) and content.__module__ == name
            # A dataclass writes its own __init__ and its like.
            written = written and not content.__code__.co_filename.startswith("<")
            if written and (not method.startswith("_") or method == "__init__"):
                yield f"{key}.{method}", content


def test_there_are_modules():
    assert {"glassgpt.attention", "glassgpt.cli", "glassgpt.checks.gpt"} <= set(MODULES)


def test_all_names_are_importable():
    assert len(set(glassgpt.__all__)) == len(glassgpt.__all__)
    for name in glassgpt.__all__:
        assert hasattr(glassgpt, name), name
    space = {}
    exec("from glassgpt import *", space)
    assert set(glassgpt.__all__) <= set(space)


def test_the_names_that_others_rely_on():
    """What the README and other programs import from the package itself."""
    promised = "softmax cosine_similarity causal_mask attention MultiHeadAttention MLP"
    promised += " Block GPTConfig GPT BPETokenizer generate train TrainConfig"
    promised += " save load"
    assert set(promised.split()) <= set(glassgpt.__all__)
    assert {"grade", "catch"} <= set(vars(module("glassgpt.checks")))


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    assert module(name).__doc__, name
    for key, value in defined_in(name).items():
        # A dataclass without a docstring gets its signature as one.
        written = value.__doc__ and not value.__doc__.startswith(f"{key}(")
        assert written, f"{name}.{key} has no docstring"
        assert "\nBook: " in inspect.getdoc(value), f"{name}.{key} names no page"


@pytest.mark.parametrize("name", MODULES)
def test_type_hints(name):
    for key, value in public_functions(name):
        signature = inspect.signature(value)
        for parameter in signature.parameters.values():
            if parameter.name not in ("self", "cls"):
                typed = parameter.annotation is not parameter.empty
                assert typed, f"{name}.{key}: {parameter.name} has no type"
        if not key.endswith(("__init__", ".forward")):
            typed = signature.return_annotation is not signature.empty
            assert typed, f"{name}.{key} has no return type"


def test_the_test_of_hints_sees_methods():
    names = dict(public_functions("glassgpt.gpt"))
    assert {"GPT.embed", "GPT.hidden_states", "GPT.__init__"} <= set(names)


def test_help_names_a_page():
    assert "Book: 06_attention.html#" in pydoc.render_doc(glassgpt.attention)
