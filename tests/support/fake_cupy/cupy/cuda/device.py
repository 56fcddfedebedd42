"""Devices, as `cupy.cuda.device` shows them."""

from __future__ import annotations

import threading

from cupy.cuda import runtime

_stacks = threading.local()


class Device:
    def __init__(self, device=None):
        self.id = runtime.getDevice() if device is None else int(device)

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return hash(self.id)

    def __repr__(self):
        return f"<CUDA Device {self.id}>"

    def __enter__(self):
        stack = _stacks.__dict__.setdefault("previous", [])
        stack.append(runtime.getDevice())
        runtime.setDevice(self.id)
        return self

    def __exit__(self, *_):
        runtime.setDevice(_stacks.previous.pop())

    def use(self):
        runtime.setDevice(self.id)
        return self

    def synchronize(self):
        with self:
            runtime.deviceSynchronize()

    @property
    def mem_info(self):
        with self:
            return runtime.memGetInfo()

    @property
    def compute_capability(self):
        return "90"

    @property
    def pci_bus_id(self):
        return runtime.deviceGetPCIBusId(self.id)


def get_device_id():
    return runtime.getDevice()
