"""Continue texts offline: several at once, greedy and sampled.

python examples/offline.py bundles/smollm2-135m
"""

import sys

from echo_trt import LLM, Completion, SamplingParams


def show(prompt: str, answer: Completion) -> None:
    print(f"{prompt}{answer.text}\n  [{answer.finish_reason}, {answer.accepted_length:.2f} tokens per verification]\n")


def main(bundle: str) -> None:
    llm = LLM(bundle)
    prompts = ["The capital of France is", "Water boils at", "def fibonacci(n):\n"]

    for prompt, answer in zip(prompts, llm.generate(prompts, SamplingParams(max_tokens=32)), strict=True):
        show(prompt, answer)

    # One set of parameters for each prompt. In fp32 the same seed gives the same text, whatever else runs beside it; in
    # bf16 and fewer bits a text may differ where others run, unless the policy is goodput-exact (docs/exactness.md).
    sampled = [SamplingParams(max_tokens=32, temperature=0.8, top_p=0.95, seed=seed) for seed in range(len(prompts))]
    for prompt, answer in zip(prompts, llm.generate(prompts, sampled), strict=True):
        show(prompt, answer)


if __name__ == "__main__":
    main(sys.argv[1])
