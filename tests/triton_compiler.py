"""Compiles every Triton kernel for CUDA devices that need not be there: the interpreter accepts what the compiler does
not. Prints a JSON object for each kernel compiled at a large SAE's sizes, with what the assembler says of it.

A process of its own, since the interpreter is chosen for a whole process (`test_kernels_triton_steps.py`).
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

OLDEST, HOPPER = (GPUTarget("cuda", capability, 32) for capability in (80, 90))
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
TYPES |= {torch.int8: "*i8", torch.uint8: "*u8"}
ASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
# What a multiprocessor of compute capability 8 or 9 has, in threads of a warp.
REGISTERS, WARPS = 65536 // 32, 64


class Compiler:
    """Takes the place of launches; the numbers that a kernel would have written stay what they are."""

    def __init__(self, targets: list[GPUTarget], aligned: bool) -> None:
        self.targets, self.aligned = targets, aligned
        self.made: list[tuple[str, str, int]] = []

        def run(kernel, *arguments, **options) -> None:
            self.take(kernel, arguments, options)

        JITFunction.run = run

    def take(self, kernel: JITFunction, arguments: tuple, options: dict) -> None:
        settings = {"num_warps": options["num_warps"]}
        given = dict(zip([parameter.name for parameter in kernel.params], arguments, strict=False)) | options
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = TYPES[value.dtype] if is_tensor else "i32"
            if self.aligned and (is_tensor or value % 16 == 0):  # as a launch finds it
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
        for target in self.targets:
            compiled = compile(source, target=target, options=settings)
            self.made.append((kernel.__name__, compiled.asm["ptx"], settings["num_warps"]))


def resources(ptx: str, num_warps: int) -> dict[str, int]:
    """Registers of a thread, bytes that did not fit in them, warps that a multiprocessor holds, bytes of the widest
    load."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ASSEMBLER, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (int(re.search(what, said)[1]) for what in (r"Used (\d+) reg", r"(\d+) bytes spill stores"))
    programs = min(REGISTERS // (-(-registers // 8) * 8 * num_warps), WARPS // num_warps)
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    widest = max((int(n or 1) * int(bits) // 8 for n, bits in loads), default=0)
    return {"registers": registers, "spilled": spilled, "warps": programs * num_warps, "widest_load": widest}


def launch_all(shape: tuple[int, int, int, int], device: str) -> None:
    """Every kernel, as a step with levels and AuxK and one of a ReLU launch them."""
    from sae.kernels import Change, Codes, Rows, State
    from sae.kernels.triton import Triton, launch
    from sae.optim import Now

    torch.set_default_device(device)
    d, d_sae, k, batch = shape
    weights = {"encoder": torch.randn(d_sae, d), "W_dec": torch.randn(d_sae, d)}
    weights |= {"b_enc": torch.randn(d_sae), "b_dec": torch.randn(d)}
    kernels, x = Triton(torch.device(device), torch.float32, "bf16"), torch.randn(batch, d)
    state = State.of(weights, unit_norm=False)
    kernels.refresh(state)
    scores = kernels.scores(x, state)
    kernels.top_k(scores, k)
    kernels.batch_top_k(scores, batch * k)
    kernels.recording = True
    kernels.positive(scores, batch * d_sae)
    n_slots = batch * k
    latents, values = torch.zeros(n_slots, dtype=torch.int32), torch.rand(n_slots)
    levels = torch.zeros(n_slots, dtype=torch.int32)
    codes = Codes(torch.arange(batch + 1) * k, latents, values, values, levels, (0.5, 0.5))
    decoded = kernels.decode(codes, state, x, 0.1)
    plan = kernels.invert(codes, torch.rand(n_slots), d_sae)
    kernels.by_latent(latents, values, d_sae)
    n_dead = d_sae // 16
    extra = Rows(torch.arange(n_dead), torch.randn(n_dead, d), torch.randn(n_dead, d), torch.randn(n_dead))
    now = Now(*(value.float() for value in Now.at(3, 1e-3, 1.0)))
    kernels.gradient_rows(state, x, decoded.gradient, plan)
    for moments in ("int8", "float32"):
        state = State.of(weights, unit_norm=False, moments=moments)
        kernels.refresh(state)
        kernels.update_(state, now, Change(x, decoded.gradient, plan=plan, extra=extra, pull=torch.rand(d_sae)))
    kernels.aux_k(x, x, extra.encoder, extra.b_enc, extra.W_dec, d // 2)
    kernels.reconstruct(torch.rand(batch, k), torch.zeros(batch, k, dtype=torch.int64), state.W_dec)
    launch._one[(1,)](torch.zeros(1, dtype=torch.int32), num_warps=1)


def main() -> None:
    from sae.kernels.triton import launch

    launch.require = lambda device, dtype: None
    Compiler([OLDEST, HOPPER], aligned=False)
    launch_all((40, 99, 30, 10), "cpu")
    compiler = Compiler([HOPPER], aligned=True)
    launch_all((768, 24576, 32, 8192), "meta")
    for name, ptx, num_warps in dict.fromkeys(compiler.made):
        print(json.dumps({"kernel": name, **resources(ptx, num_warps)}))


if __name__ == "__main__":
    main()
