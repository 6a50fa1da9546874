"""Every YAML in configs/ is read, checked against its data, and built and run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import molora
from molora.loftq import steps_of
from molora.model import adapter_parameters, sites
from molora.run_config import RunConfig, load_run_config
from molora.training.data import load_task_rows
from tests.bits import quantise

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
Factory = Callable[..., PreTrainedModel]
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(name: str) -> RunConfig:
    return load_run_config(CONFIGS / f"{name}.yaml")


@pytest.fixture(scope="module")
def base(tiny_llama: Factory) -> Factory:
    """A model of 30 layers, as many as SmolLM2 has."""

    def make(**more: Any) -> PreTrainedModel:
        shape = {"num_hidden_layers": 30, "intermediate_size": 48}
        return tiny_llama(**shape | more)

    return make


def test_there_are_configs() -> None:
    names = {file.stem for file in FILES}
    assert {"quickstart", "lora", "molora", "topk", "mola", "hydralora", "mov"} <= names


@each_file
def test_data_is_there_and_every_row_is_right(file: Path) -> None:
    for task in load_run_config(file).data.tasks:
        task = task.model_copy(update={"limit": None, "eval_limit": None})
        train, held = load_task_rows(task, "train"), load_task_rows(task, "eval")
        assert (len(train), len(held)) == (1200, 200)
        if task.labels:
            answers = {row.turns[-1].content for row in [*train, *held]}
            assert answers == set(task.labels)


@each_file
def test_it_is_built_and_every_trained_value_is_reached(
    file: Path, base: Factory
) -> None:
    config = load_run_config(file)
    # eight segments of four singular values need layers of 32 features
    more = {"num_key_value_heads": 4} if file.stem == "goat" else {}
    if config.model.quantization == "nf4":
        # on a CPU, 4-bit layers need widths that are multiples of 64
        more = {"hidden_size": 64, "intermediate_size": 64}
    plain, twin = base(**more), None
    if config.model.quantization != "none":
        plain = quantise(plain, config.model.quantization)
    if steps_of(config.adapter):
        twin = base(**more)
    model = molora.wrap(plain, config.adapter, seed=config.seed, original=twin)
    tasks = [task.name for task in config.data.tasks]
    size = (len(tasks), 12)
    ids = torch.randint(3, 128, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), molora.disabled(model):
        before = model(ids).logits
    zero = all(site.experts.starts_at_zero for site in sites(model).values())
    with molora.tasks(model, tasks):
        if zero:
            torch.testing.assert_close(model(ids).logits, before)
    model.train()
    with torch.no_grad():
        for site in sites(model).values():
            for parameter in site.experts.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    # some routers read the prompt, which ends where labels begin
    labels = ids.clone()
    labels[:, :4] = -100
    with molora.tasks(model, tasks):
        model(input_ids=ids, labels=labels).loss.backward()
    frozen = {
        f"{path}.experts.{name}"
        for path, site in sites(model).items()
        for name in site.experts.frozen
    }
    for name, parameter in adapter_parameters(model).items():
        kept = config.adapter.train == "router" and ".experts." in name
        if kept or name in frozen:
            assert not parameter.requires_grad and parameter.grad is None
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@each_file
def test_each_run_has_its_own_folder(file: Path) -> None:
    assert load_run_config(file).output_dir == Path("runs") / file.stem


def scales(model: PreTrainedModel) -> set[float]:
    return {s for site in sites(model).values() for s in site.experts.scales()}


def test_molora_has_the_sizes_of_the_authors_code(base: Factory) -> None:
    model = molora.wrap(base(), read("molora").adapter)
    for site in sites(model).values():
        assert site.experts.A.shape[:2] == (10, 4)
    assert scales(model) == {4.0}
    assert read("molora").adapter.balance == []


def test_mov_scales_keys_values_and_what_the_mlp_reads_last(base: Factory) -> None:
    model = molora.wrap(base(), read("mov").adapter)
    found = sites(model)
    shapes = {p.split(".")[-1]: s.experts.vectors.shape for p, s in found.items()}
    # 2 of 4 heads of 8 for keys and values; 48 values before the last linear
    assert shapes == {"k_proj": (30, 16), "v_proj": (30, 16), "down_proj": (30, 48)}
    assert len(found) == 30 * 3


MOLA = {
    "mola": [2] * 7 + [4] * 8 + [6] * 8 + [8] * 7,
    "mola_triangle": [8] * 7 + [6] * 8 + [4] * 8 + [2] * 7,
    "mola_hourglass": [8] * 7 + [2] * 16 + [8] * 7,
    "mola_rectangle": [5] * 30,
}


@pytest.mark.parametrize("name", MOLA)
def test_mola_has_the_shape_of_its_name(name: str, base: Factory) -> None:
    model = molora.wrap(base(), read(name).adapter)
    found = sites(model)
    counts = [
        {s.experts.num_experts for p, s in found.items() if f"layers.{i}." in p}
        for i in range(30)
    ]
    assert counts == [{count} for count in MOLA[name]]
    assert len(found) == 30 * 7


def test_hydralora_shares_one_a(base: Factory) -> None:
    model = molora.wrap(base(), read("hydralora").adapter)
    for site in sites(model).values():
        assert (site.experts.A.shape[0], site.experts.Bt.shape[0]) == (1, 4)
    assert scales(model) == {8.0}


def test_lora_trains_what_one_lora_trains(base: Factory) -> None:
    model = molora.wrap(base(), read("lora").adapter)
    layers = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    want = 30 * sum(16 * (wide + out) for wide, out in layers)
    assert sum(p.numel() for p in adapter_parameters(model).values()) == want
    assert all(site.router is None for site in sites(model).values())


def test_quickstart_uses_two_of_eight_experts_per_token(base: Factory) -> None:
    model = molora.wrap(base(), read("quickstart").adapter)
    with molora.record_routing(model) as trace, torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    for record in trace.sites.values():
        assert record.gates[0].shape == (1, 3, 8)
        assert (record.gates[0] > 0).sum(-1).tolist() == [[2, 2, 2]]
