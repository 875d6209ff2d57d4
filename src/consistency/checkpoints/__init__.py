"""Checkpoint formats: the files of other programs in, ours in and out.

| file | content | module |
|---|---|---|
| `.ckpt` of a run, converted model | ours, with its card | `ours` |
| `.pt`, `.safetensors` | flat state dict of OpenAI's `UNetModel` | `openai` |
| `.pkl`, `training-state-*.pt` | NVlabs modules (EDM, ECT) | `nvlabs` |
| `.pkl` | NVlabs modules (EDM2, ECT on ImageNet) | `edm2` |
| no suffix | training state of the JAX code, flax MessagePack | `jcm` |
| folder | `ConsistencyModelPipeline` or `UNet2DModel` | `diffusers`, `diffusers_unet` |

Nothing in a file is executed, every size in it is checked before memory is taken, and a file that does not fit ends in one
error. `load` is the door, and every reader of a format returns the `Checkpoint` of `contents`.
"""
