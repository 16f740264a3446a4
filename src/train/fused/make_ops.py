"""Writes ops.pt: an operator of libtorch that the crate tch has no binding for, as a TorchScript module.

    python3 make_ops.py          needs PyTorch 2.11; writes ops.pt beside this file

The module holds no weights, only the call: the gradient of a convolution by its input and by its kernel.
"""

import io
import pathlib
import zipfile
from typing import List, Tuple

import torch
from torch import Tensor


class Ops(torch.nn.Module):
    @torch.jit.export
    def conv_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, stride: List[int], padding: List[int], by_input: bool
    ) -> Tuple[Tensor, Tensor]:
        none = [0] * len(stride)
        one = [1] * len(stride)
        gx, gw, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, one, False, none, 1, [by_input, True, False]
        )
        if not by_input:
            gx = x
        return gx, gw

    def forward(self, x: Tensor) -> Tensor:
        return x


if __name__ == "__main__":
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Ops()), buffer)
    # Without what says where this file lay.
    with zipfile.ZipFile(buffer) as made, zipfile.ZipFile(pathlib.Path(__file__).with_name("ops.pt"), "w") as out:
        for entry in made.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                out.writestr(zipfile.ZipInfo(entry.filename), made.read(entry))
