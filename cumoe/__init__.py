"""Mixture-of-Experts layers on NVIDIA GPUs with CuPy and NumPy alone.

Data goes one way: route -> group -> grouped_gemm -> combine; `moe` does the last three, `MoE` all four.
"""

import logging
import sys

from cumoe.doctor.asked import is_asked_for

if is_asked_for(sys.argv, sys.orig_argv):  # it answers also where what follows cannot be imported, and ends here
    from cumoe.doctor.main import main

    sys.exit(main(sys.argv[2:]))

from cumoe import reference
from cumoe.checkpoint.load import LayerShape, layers, load
from cumoe.data.activation import Activation
from cumoe.data.frame import Latent, RMSNorm
from cumoe.data.groups import Groups
from cumoe.data.routing import Router, Routing
from cumoe.data.weights import Experts, SharedExperts
from cumoe.gpu.compile import compile_all, gpu_is_there, why_no_gpu
from cumoe.layer.module import MoE
from cumoe.layer.moe import moe
from cumoe.stages.combine import combine
from cumoe.stages.expert_load import ExpertLoad, expert_load
from cumoe.stages.group import group
from cumoe.stages.grouped_gemm import grouped_gemm
from cumoe.stages.route import route
from cumoe.system import show_config
from cumoe.version import __version__

__all__ = [
    "Activation",
    "ExpertLoad",
    "Experts",
    "Groups",
    "Latent",
    "LayerShape",
    "MoE",
    "RMSNorm",
    "Router",
    "Routing",
    "SharedExperts",
    "__version__",
    "combine",
    "expert_load",
    "group",
    "grouped_gemm",
    "layers",
    "load",
    "moe",
    "reference",
    "route",
    "show_config",
]

logging.getLogger("cumoe").addHandler(logging.NullHandler())

if gpu_is_there():
    compile_all()
else:
    logging.getLogger("cumoe").info("no GPU is used: %s", why_no_gpu())
