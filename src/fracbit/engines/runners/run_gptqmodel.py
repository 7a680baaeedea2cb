"""Runs in the environment of GPTQModel: what it predicts for given ids, and what its weights are."""

from pathlib import Path

import gptqmodel
import numpy
import torch
from answer import answer, asked, hashed


def main():
    """Load the export with the kernels in plain torch."""
    given = asked()
    awq = '"awq"' in Path(given.export, "config.json").read_text(encoding="utf-8")
    backend = gptqmodel.BACKEND.TORCH_AWQ if awq else gptqmodel.BACKEND.TORCH
    loaded = gptqmodel.GPTQModel.load(
        given.export, backend=backend, device="cpu", dtype=getattr(torch, given.dtype)
    )
    model, ids = loaded.model, torch.from_numpy(given.ids).long()  # [samples, length]
    weights = {
        name: {"dtype": given.dtype, "sha256": hashed(module.dequantize_weight().T.float().numpy())}
        for name, module in model.named_modules()
        if hasattr(module, "dequantize_weight")
    }
    with torch.no_grad():
        logits = model(ids).logits.float()[:, :-1]  # [samples, length - 1, vocabulary]
        whole = model.generate(
            ids, max_new_tokens=given.greedy, min_new_tokens=given.greedy, do_sample=False, pad_token_id=0
        )  # fmt: skip
    versions = {"gptqmodel": gptqmodel.__version__, "torch": torch.__version__}
    answer(
        given.out, versions, logits=logits.numpy(), greedy=numpy.array(whole[:, ids.shape[1] :]), weights=weights
    )  # fmt: skip


if __name__ == "__main__":
    main()
