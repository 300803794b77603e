"""The CUDA face: without a GPU, `torch.cuda`, `.cuda()` and `device="cuda"` mean the simulated accelerator.

Tensors "on the device" stay in CPU memory and keep the device `cpu`. A `SimulatedDevice`, which the accelerator package
implements and `moreh.attach` passes in, remembers which they are and what they take.

- `face`: installs the whole, and reads MOREH_CUDA_FACE
- `queries`: the functions of torch.cuda
- `factories`: functions that create a tensor
- `moves`: methods that move a tensor or a module
- `device_types`: torch.autocast and torch.load, which take the name of a device
- `caller_origin`: tells a script's calls from a library's
- `device_argument`: which device arguments mean the accelerator
- `simulated_device`: what the face needs from the accelerator
"""
