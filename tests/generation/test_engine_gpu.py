"""An engine on the GPU that is here, under the loop that runs its ONNX twin. Not run yet: no GPU was at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.generation.speaker import Local
from deepseek_compress.generation.targets import open_target
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.export import Export
from deepseek_compress.tasks import mixture
from tests.export.conftest import write_quantised

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_it_says_what_the_runtime_says(tmp_path: Path, scheme: str) -> None:
    """Greedy tokens of two prompts, the second beginning like the first: the cache on the GPU is cut back."""
    pytest.importorskip("tensorrt_rtx")
    source = open_checkpoint(write_quantised(resolve_model("builtin:nano"), tmp_path / "w4", scheme))
    here = "sm{}{}".format(*torch.cuda.get_device_capability())
    stage = Export.model_validate({"target": "tensorrt-rtx", "compute_capabilities": [here]})
    stage.run(source, Context("export", tmp_path / "engine", "", 0, tell=lambda line: None))
    speaker = open_target(str(tmp_path / "engine"))
    assert isinstance(speaker, Local)
    assert speaker.backend.name == "TensorRT engine"
    model, text = Model.load(source), next(iter(mixture(3, 1, split="calibration"))).prompt
    ids = load_tokenizer(source.path).encode(text, special=True)
    for prompt in (ids, [*ids[:-2], 7]):
        made = [int(speaker.backend.prefill(prompt).argmax())]
        while len(made) < 32:
            made.append(int(speaker.backend.step(made[-1]).argmax()))
        with torch.no_grad():
            logits = model.forward(torch.tensor([[*prompt, *made]]))[0, len(prompt) - 1 : -1]
        best = logits.topk(2).values
        clear = (best[:, 0] - best[:, 1]) > 0.05 * logits.abs().amax(-1)
        assert int(clear.sum()) > 10
        assert torch.equal(logits.argmax(-1)[clear], torch.tensor(made)[clear])
