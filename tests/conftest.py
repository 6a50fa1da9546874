"""Settings and tiny models that all tests share."""

import os

# before anything decorates a kernel: the tests run kernels on the CPU
os.environ.setdefault("TRITON_INTERPRET", "1")

# before torch starts its threads: processes side by side take one each
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# before anything imports transformers, which reads these once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

ROOT = Path(__file__).resolve().parent.parent
Factory = Callable[..., PreTrainedModel]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run in which a mapped folder was imported under its bare name."""
    bare = [name for name in ("kernels", "routers", "training") if _is_ours(name)]
    if bare:
        print(f"\nimported without the molora prefix: {', '.join(bare)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _is_ours(name: str) -> bool:
    """Whether a top-level module of this name was loaded from the checkout."""
    folders = getattr(sys.modules.get(name), "__path__", [])
    return any(Path(folder) == ROOT / name for folder in folders)


def _seeded(cls: type[PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    """Initialise a model from seed and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).eval()


@pytest.fixture(scope="session")
def tiny_llama() -> Factory:
    """Make a new Llama: 2 layers, hidden 32, vocabulary 128; settings override."""

    def make(seed: int = 0, **settings: Any) -> PreTrainedModel:
        shape = {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        return _seeded(LlamaForCausalLM, LlamaConfig(**shape | settings), seed)

    return make


@pytest.fixture(scope="session")
def tiny_gpt2() -> Factory:
    """Make a new GPT-2 (Conv1D layers): 2 layers, width 32, vocabulary 128."""

    def make(seed: int = 0, **settings: Any) -> PreTrainedModel:
        shape = {
            "vocab_size": 128,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        return _seeded(GPT2LMHeadModel, GPT2Config(**shape | settings), seed)

    return make
