"""The LoRA core: adapt any PyTorch model, train it, and hand the updates to the microscope.

A tour. Adapting freezes the model and puts trainable factors beside the chosen weights; training moves only the
factors; ``extract`` gives an ``Adapter`` like one read from a file; ``merge`` folds the updates into the weights
and ``unmerge`` takes them out again, bit for bit.

>>> import torch
>>> from lora_analysis import training
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
>>> training.inject(model, ["0", "2"], r=4, alpha=8, seed=0)
['0', '2']
>>> x = torch.linspace(-1, 1, 80).reshape(10, 8)
>>> losses = training.train(model, [x] * 20, lambda model, x: (model(x) - x.sum(1, keepdim=True)).square().mean())
>>> len(losses), losses[-1] < losses[0]
(20, True)
>>> adapter = training.extract(model)
>>> adapter["0"]
LowRankUpdate(16x8, r=4, scale=2, torch.float32)
>>> training.merge(model)
>>> training.unmerge(model)

The initial factors stay beside the trained ones, because A is mostly its initialisation:
``lora_layers(model)["0"].factors.lora_A0``.

References
----------
Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
"""

from lora_analysis.training.accounting import checkpoint_bytes, lora_count, parameter_count
from lora_analysis.training.attach import attach
from lora_analysis.training.checkpoints import checkpoint_dynamics
from lora_analysis.training.distributed import local_parts, process_group
from lora_analysis.training.dynamics import TrainingDynamics, dynamics_table, read_dynamics
from lora_analysis.training.export import load_peft, lora_state_dict, save_peft
from lora_analysis.training.extract import extract
from lora_analysis.training.factors import LoraFactors
from lora_analysis.training.frozen_prefix import frozen_prefix
from lora_analysis.training.inject import inject
from lora_analysis.training.layers import LoraLayer, LoraParameter, lora_layers, sites
from lora_analysis.training.loop import train
from lora_analysis.training.memory import measured_memory, peak_memory, training_memory
from lora_analysis.training.merging import merge, merge_and_unload, unmerge
from lora_analysis.training.optimizer import parameter_groups
from lora_analysis.training.switching import activate, adapters, remove
from lora_analysis.training.system_claims import gpt3_175b, system_claims

__all__ = [
    "LoraFactors",
    "LoraLayer",
    "LoraParameter",
    "TrainingDynamics",
    "activate",
    "adapters",
    "attach",
    "checkpoint_bytes",
    "checkpoint_dynamics",
    "dynamics_table",
    "extract",
    "frozen_prefix",
    "gpt3_175b",
    "inject",
    "load_peft",
    "local_parts",
    "lora_count",
    "lora_layers",
    "lora_state_dict",
    "measured_memory",
    "merge",
    "merge_and_unload",
    "parameter_count",
    "parameter_groups",
    "peak_memory",
    "process_group",
    "read_dynamics",
    "remove",
    "save_peft",
    "sites",
    "system_claims",
    "train",
    "training_memory",
    "unmerge",
]
