"""Every YAML in configs/ is read, checked against its data, and built and run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import molora
from molora.model import adapter_parameters, sites
from molora.run_config import RunConfig, load_run_config
from molora.training.data import load_task_rows

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
Factory = Callable[..., PreTrainedModel]
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(name: str) -> RunConfig:
    return load_run_config(CONFIGS / f"{name}.yaml")


@pytest.fixture(scope="module")
def base(tiny_llama: Factory) -> Factory:
    """A model of 30 layers, as many as SmolLM2 has."""
    return lambda: tiny_llama(num_hidden_layers=30, intermediate_size=48)


def test_there_are_configs() -> None:
    names = {file.stem for file in FILES}
    assert {"quickstart", "lora", "molora", "topk", "mola", "hydralora"} <= names


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
    model = molora.wrap(base(), config.adapter, seed=config.seed)
    tasks = [task.name for task in config.data.tasks]
    size = (len(tasks), 12)
    ids = torch.randint(3, 128, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), molora.disabled(model):
        before = model(ids).logits
    # the update is zero at the start
    with molora.tasks(model, tasks):
        torch.testing.assert_close(model(ids).logits, before)
    model.train()
    with torch.no_grad():
        for site in sites(model).values():
            site.experts.Bt.normal_(std=0.1)
    with molora.tasks(model, tasks):
        model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in adapter_parameters(model).items():
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


def test_mola_has_more_experts_in_higher_layers(base: Factory) -> None:
    model = molora.wrap(base(), read("mola").adapter)
    found = sites(model)
    counts = [
        {s.experts.num_experts for p, s in found.items() if f"layers.{i}." in p}
        for i in range(30)
    ]
    assert counts == [{2}] * 7 + [{4}] * 8 + [{6}] * 8 + [{8}] * 7
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
