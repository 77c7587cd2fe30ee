"""Run by torchrun: trains a tiny Llama of every structure, whole and by adapters; rank 0 writes the parameters.

torchrun --nproc-per-node N trained_in_processes.py one|ddp|fsdp OUT"""
import sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import lowfat

PLAN = {"*q_proj": {"structure": "LowRank", "rank": 4}, "*k_proj": {"structure": "Monarch", "blocks": 2, "rank": 2},
        "*v_proj": {"structure": "Sparse24"}, "*o_proj": {"structure": "Dictionary", "atoms": 16, "nonzeros": 4},
        "*gate_proj": {"structure": "Sum", "parts": [{"structure": "LowRank", "rank": 2}, {"structure": "Sparse24"}]},
        "*up_proj": {"structure": "LowRankSparse", "rank": 4, "density": 0.1},
        "*down_proj": {"structure": "LowRank", "rank": 4}}


def llama(is_adapted: bool) -> LlamaForCausalLM:
    """Every structure in its layers; adapted: all of it frozen, and wavelet adapters on the low-rank layers trained."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=False)).double()
    lowfat.replace(model, PLAN)
    if is_adapted:
        lowfat.adapt(model, layers=["*q_proj", "*down_proj"], rank=2, filter="db2")
    return model


def train(model: LlamaForCausalLM, kind: str) -> dict[str, torch.Tensor]:
    """Every parameter after three steps."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    trained = model
    if kind == "ddp":
        trained = DistributedDataParallel(model)
    if kind == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(lowfat.parameter_groups(model), lr=1e-2)
    for step in range(3):
        tokens = torch.randint(0, 97, (4, 8), generator=torch.Generator().manual_seed(step)).chunk(count)[rank]
        trained(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: (parameter.full_tensor() if kind == "fsdp" else parameter).detach()
            for name, parameter in model.named_parameters()}


def main(kind: str, out: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {f"{'adapted' if is_adapted else 'whole'}.{name}": parameter for is_adapted in (False, True)
             for name, parameter in train(llama(is_adapted), kind).items()}
    if distributed.get_rank() == 0:
        torch.save(found, out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
