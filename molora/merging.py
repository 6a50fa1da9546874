"""Folding an adapter of one expert into the weights of its base, and taking it out.

A quantised base has two weights that an update can be added to: the dequantised ones,
with which the adapter was trained, and the original ones, from before quantisation.
Both give an ordinary model.

Shape legend
    I in features   O out features
"""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from molora.errors import WrapError
from molora.layer import MoloraLinear
from molora.mergeable import MergeCost
from molora.originals import originals
from molora.quantized import (
    bits_of,
    compute_dtype,
    dequantised,
    plain_linear,
)
from molora.wrapped import adapter_parameters, sites

M = TypeVar("M", bound=nn.Module)
BASES = ("dequantised", "original")
"""Weights that a merge can add an update to, where the base is quantised."""


def merge(model: M, base: str | None = None, original: nn.Module | None = None) -> M:
    """Fold each bank's update into its base weight; what was there is kept.

    Every quantised layer of the model, with experts or without, becomes an ordinary
    one in the dtype that it computed in; ``merge_costs`` tells how far those with
    experts are from either weight.

    Where experts hold what quantising took from the base, that is not added to the
    original weights, which lack nothing (``init_lora_weights: loftq``).

    Args:
        model: A wrapped model whose banks all have one expert (see ``collapse``).
        base: Where the base is quantised, one of ``BASES``; there is no default. Where
            it is not, and a loaded adapter was trained on one that is, ``original``.
        original: The model before quantisation, for example of
            ``load_base(name)``; needed for ``original``, else only for the costs. With
            ``original`` the result is that of an adapter loaded onto that model.

    Returns:
        The same object.

    Raises:
        WrapError: A bank routes among several experts, the model is merged already, a
            target's weight is tied to another module, or a merged weight is not
            finite; a quantised base without ``base`` or another base with it; no
            ``original``, or another model. The weights are left as they were.
    """
    found = sites(model)
    if any(site.merged for site in found.values()):
        raise WrapError("the model is merged already; call molora.unmerge first")
    _check_untied(model, found)
    quantised = {p: s.base for p, s in found.items() if bits_of(s.base) is not None}
    check_choice(
        bool(quantised),
        base,
        original is not None,
        trained_rounded(model),
    )
    if original is not None and not quantised:
        raise WrapError(
            "merge: original is not read where the base is not quantised: the update "
            "is added to the weights that the model holds. Leave it out"
        )
    rest = _others(model, quantised) if quantised else {}
    # experts of LoftQ stand on weights of their own
    given = {path: found[path].given_layer for path in quantised} | rest
    weights = {} if original is None else originals(original, given, "merge")
    banks = adapter_parameters(model)
    frozen = [p for name, p in model.named_parameters() if name not in banks]
    done: list[MoloraLinear] = []
    try:
        for path, site in found.items():
            if path in quantised:
                assert base is not None
                dtype = compute_dtype(site.base, frozen)
                site.merge_quantised(base, dtype, weights.get(path))
            else:
                site.merge()
            done.append(site)
    except WrapError:
        for site in done:
            site.unmerge()
        raise
    for path, layer in rest.items():
        weight = weights[path] if base == "original" else dequantised(layer)
        plain = plain_linear(layer, weight, compute_dtype(layer, frozen))
        model.set_submodule(path, plain)
    model.__dict__["_molora_state"]["quantised"] = rest
    return model


def unmerge(model: M) -> M:
    """Restore the exact bytes of the base weights, and the quantised layers.

    Raises:
        WrapError: The model is not merged.
    """
    merged = [site for site in sites(model).values() if site.merged]
    if not merged:
        raise WrapError("the model is not merged; there is nothing to restore")
    for site in merged:
        site.unmerge()
    for path, layer in model.__dict__["_molora_state"].pop("quantised").items():
        model.set_submodule(path, layer)
    return model


def merge_costs(model: nn.Module) -> dict[str, MergeCost]:
    """What merging cost, by path of the layers that were quantised.

    Args:
        model: A wrapped model that is merged; empty where nothing was quantised.

    Raises:
        WrapError: The model is not wrapped.
    """
    found = sites(model).items()
    return {path: s.merge_cost for path, s in found if s.merge_cost is not None}


def note_training(model: nn.Module, quantised: bool) -> None:
    """Note whether the adapter of a model was trained on a quantised base."""
    model.__dict__["_molora_state"]["rounded"] = quantised


def trained_rounded(model: nn.Module) -> bool:
    """Whether the loaded adapter of a model was trained on a quantised base."""
    noted: bool = model.__dict__["_molora_state"].get("rounded", False)
    return noted


def check_choice(
    quantised: bool, base: str | None, given: bool = True, rounded: bool = False
) -> None:
    """Refuse a merge that does not say onto which weights, or says so for nothing.

    Args:
        quantised: Whether the base is.
        base: One of ``BASES``, or None.
        given: Whether the model before quantisation is at hand.
        rounded: Whether the adapter was trained on a quantised base.

    Raises:
        WrapError: It is missing, unknown, or means nothing.
    """
    if not quantised and rounded:
        if base != "original":
            raise WrapError(
                "merge: the adapter was trained on a quantised base, and this one "
                "holds the original weights, which it was not trained on: say "
                "base='original' (--base original) to add the update to them, or "
                "quantise the base as it was (model.quantization) and say "
                "base='dequantised' (--base dequantised)"
            )
        return
    if not quantised and base is not None:
        raise WrapError(
            f"merge: base={base!r} is a choice for quantised bases; this one is not "
            "quantised, so leave it out"
        )
    if quantised and base not in BASES:
        told = "say which" if base is None else f"{base!r} is neither"
        raise WrapError(
            "merge: the base is quantised, so the update can be added to two weights: "
            "base='dequantised' (--base dequantised), the rounded ones that it was "
            "trained on, or base='original' (--base original), those before "
            "quantisation, which are nearer to the "
            f"model but were not what it was trained on; {told}"
        )
    if base == "original" and not given:
        raise WrapError(
            "merge: base='original' needs the weights before quantisation: give the "
            "unquantised model as original, for example that of load_base(name)"
        )


def _others(model: nn.Module, taken: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Quantised layers by path, without those taken."""
    known = {id(layer) for layer in taken.values()}
    return {
        path: layer
        for path, layer in model.named_modules()
        if bits_of(layer) is not None and id(layer) not in known
    }


def _check_untied(model: nn.Module, found: dict[str, MoloraLinear]) -> None:
    """Refuse to merge into a weight that another module uses as well."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path, site in found.items():
        names = owners[id(site.base.weight)]
        if len(names) > 1:
            raise WrapError(
                f"site {path!r}: its weight is tied to {names}, which a merge would "
                "change as well; leave this layer out of target_modules"
            )
