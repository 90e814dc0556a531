"""Examples for every command, shown at the end of its --help."""

from __future__ import annotations

import typer

EXAMPLES = {
    "": ["sinkscope models", "sinkscope scan bb-3l --prompts 8 --length 64"],
    "models": ["sinkscope models"],
    "models install": ["sinkscope models install smollm2-135m"],
    "models show": ["sinkscope models show smollm2-135m", "sinkscope models show ./my-model"],
    "models families": ["sinkscope models families", "sinkscope models families llama"],
    "scan": [
        "sinkscope scan smollm2-135m --prompts 16 --length 256 --out results",
        "sinkscope scan smollm2-135m --texts notes.txt --sinks auto",
        "sinkscope scan smollm2-135m --tokens tokens.json --metrics core --json",
    ],
    "report": ["sinkscope report results/report.nc"],
    "compare": ["sinkscope compare before/report.nc after/report.nc --page change.html"],
    "waiver": [
        "sinkscope waiver minilm-l6 --ask norms,positions",
        "sinkscope waiver smollm2-135m --ask mask --position 100 --out results",
    ],
    "dormant": [
        "sinkscope dormant smollm2-135m --domains prose,code --out results",
        "sinkscope dormant smollm2-135m --remove mean --remove-prompts 4",
    ],
    "dynamics": [
        "sinkscope dynamics 0 1000 143000 --model EleutherAI/pythia-70m --out results",
        "sinkscope dynamics runs/checkpoint-500 runs/checkpoint-1000",
        "sinkscope dynamics --seeds seed0/checkpoint-500 seed1/checkpoint-500 --out results",
    ],
    "trace-peak": ["sinkscope trace-peak smollm2-135m --prompts 4 --out results"],
    "vocabulary": [
        "sinkscope vocabulary smollm2-135m --out results",
        "sinkscope vocabulary ./my-model --sample 4096 --further 0",
    ],
    "life": ["sinkscope life smollm2-135m --prompts 8 --length 64 --out results"],
    "experts": [
        "sinkscope experts allenai/OLMoE-1B-7B-0924 --prompts 4 --length 256 --out results",
        "sinkscope experts ./my-routed-model --no-ablate --json",
    ],
    "spikes": [
        "sinkscope spikes Qwen/Qwen3.5-0.8B --prompts 8 --length 128 --out results",
        "sinkscope spikes ./my-hybrid-model --sink 0 --json",
    ],
    "transplant": [
        "sinkscope transplant smollm2-135m --prompts 4 --out results",
        "sinkscope transplant smollm2-135m --donor mean",
    ],
    "precision": [
        "sinkscope precision smollm2-135m --prompts 4 --out results",
        "sinkscope precision smollm2-135m --schemes int4-token,int2-group64-asym "
        "--tensors key,value",
    ],
    "positions": [
        "sinkscope positions smollm2-135m --prompts 1 --length 512 --out results",
        "sinkscope positions ./my-model --shifts 16,65536 --dtypes bfloat16 --keep none,both",
    ],
    "stream": [
        "sinkscope stream smollm2-135m --tokens 4096 --windows 256 --sinks 0,4",
        "sinkscope stream smollm2-135m --windows none --designated none --sinks 0,1,4 "
        "--quantise int8-token,int4-token,int2-group64-asym",
    ],
    "sweep": [
        "sinkscope sweep sweep.yaml --dry-run",
        "sinkscope sweep sweep.yaml --out runs --workers 2",
        "sinkscope sweep sweep.yaml --ray auto --num-gpus 0.5",
    ],
    "atlas": ["sinkscope atlas runs --out atlas.html"],
    "bench": ["sinkscope bench --shape smollm2-135m --sizes 8x256,1x1024"],
    "bb train": [
        "sinkscope bb train --steps 500 --out run",
        "sinkscope bb train --layers 3 --heads 4 --steps 600 --seed 1 --snapshots 0,300,600 "
        "--out seed1",
    ],
    "bb compare": ["sinkscope bb compare --attention softmax,relu --seeds 2 --steps 500"],
    "bb dynamics": ["sinkscope bb dynamics run --out curves"],
}
"""Example command lines, by command."""


def add_to(app: typer.Typer, name: str = "") -> None:
    """Append examples to the help of an app and of all its commands."""
    if app.registered_callback is not None:
        app.registered_callback.epilog = _written(name)
    for command in app.registered_commands:
        command.epilog = _written(f"{name} {command.name or command.callback.__name__}".strip())
    for group in app.registered_groups:
        add_to(group.typer_instance, f"{name} {group.name}".strip())


def _written(name: str) -> str | None:
    lines = EXAMPLES.get(name)
    return None if lines is None else "\n\n".join(["Examples:", *(f"- `{line}`" for line in lines)])
