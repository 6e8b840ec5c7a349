"""Each build of the library of networks in turn, and none: fixtures and what results are compared by."""

from functools import cache

import pytest
import torch

from worldmpc.models import kernels, native

TORCH = "torch"


@cache
def loaded(variant) -> native.Library | str:
    """One library alone, or why it cannot be had here."""
    if variant == TORCH:
        return "left out by the test"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "VARIANTS", {variant: native.VARIANTS[variant]})
        try:
            return native._load()
        except native.Unavailable as reason:
            return str(reason)


def functions_of(library) -> dict:
    return {name: part for name, part in library._asdict().items() if callable(part)}


def use(patch, variant) -> list[str]:
    """Evaluate networks by one library, whatever their number of rows, or by none; return the list its calls will appear in."""
    library, calls = loaded(variant), []

    def counted(name, function):
        return lambda net: calls.append(name) or function(net)

    if not isinstance(library, str):
        library = library._replace(**{name: counted(name, function) for name, function in functions_of(library).items()})
    elif variant != TORCH:
        pytest.skip(f"{variant}: {library}")
    patch.setattr(native, "library", lambda: library)
    patch.setattr(kernels, "NATIVE_FROM", 1)
    return calls


@pytest.fixture(params=native.VARIANTS)
def calls(request, monkeypatch):
    """Each library in turn, with the calls of it."""
    return use(monkeypatch, request.param)


@pytest.fixture(params=[*native.VARIANTS, TORCH])
def every(request, monkeypatch):
    """Each library and PyTorch in turn."""
    use(monkeypatch, request.param)
    return request.param


@pytest.fixture
def best(monkeypatch):
    """The library that is used here, if any, with the calls of it."""
    library = native.library()
    return use(monkeypatch, TORCH if isinstance(library, str) else library.name)


@pytest.fixture
def fast(best):
    """The same where there is one."""
    if isinstance(native.library(), str):
        pytest.skip(native.library())
    return best


@pytest.fixture(params=["library", TORCH])
def either(request, monkeypatch):
    """The library that is used here and PyTorch in turn, for what does not depend on the processor."""
    library = native.library()
    if request.param == TORCH:
        use(monkeypatch, TORCH)
    elif isinstance(library, str):
        pytest.skip(library)
    else:
        use(monkeypatch, library.name)
    return request.param


@pytest.fixture
def refusing(monkeypatch):
    """A library that must not be called, as it would read memory that is not there."""
    library = native.library()
    if isinstance(library, str):
        return

    def refuse(net):
        raise AssertionError("the library was called")

    guarded = library._replace(**dict.fromkeys(functions_of(library), refuse))
    monkeypatch.setattr(native, "library", lambda: guarded)


def close(found, wanted, tolerance, name="value"):
    """Equal up to a share of the largest number, or of 1."""
    wanted = wanted.detach().double()
    assert found.shape == wanted.shape and found.dtype == torch.float32, name
    error, scale = (found.double() - wanted).abs().max().item(), max(wanted.abs().max().item(), 1.0)
    assert error <= tolerance * scale, f"{name}: off by {error:.2g} of {scale:.2g}"


def skipping(x):
    """The same numbers at every other place in memory."""
    return torch.stack((x, torch.full_like(x, 7)), -1)[..., 0]


def transposed(x):
    """The same numbers with the first dimension last in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)
