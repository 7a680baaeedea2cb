"""Runs in an environment of transformers without fracbit: what it predicts for given ids."""

import torch
import transformers
from answer import answer, asked


def main():
    """Load the export with the class that its config names."""
    given = asked()
    ids = torch.from_numpy(given.ids).long()  # [samples, length]
    model = transformers.AutoModelForCausalLM.from_pretrained(given.export, dtype=getattr(torch, given.dtype))
    with torch.no_grad():
        logits = model(ids).logits.float()[:, :-1]  # [samples, length - 1, vocabulary]
        whole = model.generate(
            ids, max_new_tokens=given.greedy, min_new_tokens=given.greedy, do_sample=False, pad_token_id=0
        )  # fmt: skip
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    answer(given.out, versions, logits=logits.numpy(), greedy=whole[:, ids.shape[1] :].numpy())


if __name__ == "__main__":
    main()
