"""Quantize a model by gptqmodel, and try DoRA on it: a process of its own, for gptqmodel changes transformers.

python by_gptqmodel.py quantize KIND MODEL OUT        python by_gptqmodel.py try KIND MODEL OUT.json
"""

import json
import os
import sys
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD
from quantized_trial import try_storage
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

AWQ = {"quant_method": METHOD.AWQ, "format": FORMAT.GEMM}
KINDS = {
    "gptq": {"bits": 4, "group_size": 32, "desc_act": False},
    "gptq-act-order": {"bits": 4, "group_size": 32, "desc_act": True},
    "gptq-8": {"bits": 8, "group_size": 64, "sym": False},
    "awq": {"bits": 4, "group_size": 32, **AWQ},
}


def quantize(kind: str, model: str, out: str) -> None:
    """Write a checkpoint of this kind."""
    # it makes no pool of threads on a small machine
    os.cpu_count = lambda: 8
    torch.manual_seed(0)
    made = GPTQModel.load(model, QuantizeConfig(device="cpu", **KINDS[kind]))
    rows = torch.randint(3, made.config.vocab_size, (16, 64)).tolist()
    made.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=4)
    made.save(out)


def load(kind: str, model: str) -> torch.nn.Module:
    """By transformers, with kernels that need no compiler."""
    awq = kind == "awq"
    own = AwqConfig(bits=4, group_size=32, backend="torch_awq") if awq else GPTQConfig(bits=4, backend="torch")
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=own)


if __name__ == "__main__":
    verb, kind, model, out = sys.argv[1:]
    if verb == "quantize":
        quantize(kind, model, out)
    else:
        Path(out).write_text(json.dumps(try_storage(lambda: load(kind, model))))
