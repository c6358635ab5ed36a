"""lm-eval: log-likelihood and generation, on a few questions that are written here."""

import json
import os
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from tried import BASE, MODEL, tried

QUESTIONS = [
    ("The capital of France is", ["Paris", "London", "Berlin"], 0),
    ("2 + 2 =", ["5", "4", "22"], 1),
    ("The color of the sky on a clear day is", ["green", "red", "blue"], 2),
]
rows = [{"q": question, "choices": choices, "a": right} for question, choices, right in QUESTIONS]
Path("questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
common = f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: {Path("questions.jsonl").resolve()}}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
"""
Path("choice.yaml").write_text(
    f'task: echo_choice\n{common}output_type: multiple_choice\ndoc_to_choice: "{{{{choices}}}}"\n'
    'doc_to_target: "{{a}}"\nmetric_list: [{metric: acc}]\n'
)
Path("text.yaml").write_text(
    f'task: echo_text\n{common}output_type: generate_until\ndoc_to_target: "{{{{choices[a]}}}}"\n'
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n'
)


def scores(task: str) -> dict:
    arguments = {
        "model": MODEL,
        "base_url": f"{BASE}/completions",
        "tokenizer": os.environ["TOKENIZER"],
        "num_concurrent": 4,
        "max_retries": 1,
    }
    manager = TaskManager(include_path=".")
    done = lm_eval.simple_evaluate("local-completions", model_args=arguments, tasks=[task], task_manager=manager)
    return done["results"][task]


tried("multiple_choice (log-likelihood)", lambda: scores("echo_choice"))
tried("generate_until", lambda: scores("echo_text"))
