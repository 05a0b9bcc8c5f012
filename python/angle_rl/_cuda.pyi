"""
Device kernels of angle_rl. The same bindings as _cuda_host's, over kernels compiled for CUDA devices.
"""
from angle_rl._cuda_host import *
