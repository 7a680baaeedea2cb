"""Runs in vLLM's environment: what it predicts for given ids."""

import numpy
import torch
import vllm
from answer import answer, asked


def main():
    """Load the export in this process, and keep the logits that its model computes."""
    given = asked()
    length = given.ids.shape[1]
    engine = vllm.LLM(
        model=given.export, dtype=given.dtype, max_model_len=length + given.greedy, max_num_seqs=1, enforce_eager=True,
        enable_prefix_caching=False, max_num_batched_tokens=max(length, 2048),
    )  # fmt: skip
    seen = []
    engine.apply_model(lambda model: spy(model, seen))
    logits, greedy = [], []
    how = vllm.SamplingParams(temperature=0, max_tokens=given.greedy, prompt_logprobs=0, ignore_eos=True)
    for row in given.ids:
        seen.clear()
        (made,) = engine.generate([{"prompt_token_ids": row.tolist()}], how, use_tqdm=False)
        logits.append(numpy.concatenate([found for found in seen if len(found) > 1])[: length - 1])
        greedy.append(made.outputs[0].token_ids)
    answer(
        given.out, {"vllm": vllm.__version__, "torch": torch.__version__}, logits=numpy.stack(logits),
        greedy=numpy.array(greedy),
    )  # fmt: skip


def spy(model, seen):
    """Keep all logits that `model` computes from here on in `seen`, each [tokens, vocabulary]."""
    compute = model.compute_logits

    def kept(*words, **options):
        found = compute(*words, **options)
        seen.append(found.detach().float().numpy())
        return found

    model.compute_logits = kept


if __name__ == "__main__":
    main()
