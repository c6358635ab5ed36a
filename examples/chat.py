"""Chat with a bundle in the terminal. An empty line ends it.

python examples/chat.py bundles/smollm2-135m
"""

import sys

from echo_trt import LLM


def main(bundle: str) -> None:
    llm = LLM(bundle)
    messages = [{"role": "system", "content": "You answer in one or two sentences."}]
    while question := input("you: ").strip():
        messages.append({"role": "user", "content": question})
        [answer] = llm.chat(messages, llm.sampling(max_tokens=64))
        print(f"it:  {answer.text}")
        # The next turn computes only what is new: the prefix cache holds the conversation so far.
        messages.append({"role": "assistant", "content": answer.text})


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except EOFError:  # the input ended
        print()
