"""Compiles every Triton kernel for a CUDA device that need not be there: the interpreter accepts what the compiler
does not. A process of its own, since the interpreter is chosen for a whole process (`test_kernels_triton_steps.py`).
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

TARGETS = [GPUTarget("cuda", capability, 32) for capability in (80, 90)]
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
TYPES |= {torch.int8: "*i8", torch.uint8: "*u8"}
compiled: set[str] = set()


def compile_only(self, *arguments, grid, warmup=False, **options) -> None:
    """In place of a launch; the numbers that a kernel would have written stay what they are."""
    settings = {"num_warps": options.pop("num_warps")}
    given = dict(zip([parameter.name for parameter in self.params], arguments, strict=False)) | options
    signature, constants = {}, {}
    for parameter in self.params:
        value = given[parameter.name]
        if parameter.is_constexpr:
            constants[parameter.name] = value
        signature[parameter.name] = (
            "constexpr" if parameter.is_constexpr else TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        )
    source = ASTSource(self, signature=signature, constexprs=constants)
    for target in TARGETS:
        compile(source, target=target, options=settings)
    compiled.add(self.__name__)


def main() -> None:
    """Every kernel once, as a step with levels and AuxK and one of a ReLU launch them."""
    JITFunction.run = compile_only
    from sae.kernels import Codes, Rows, State
    from sae.kernels.triton import Triton, launch
    from sae.optim import Now

    launch.require = lambda device, dtype: None
    batch, d, d_sae, k = 5, 40, 99, 3
    weights = {"encoder": torch.randn(d_sae, d), "W_dec": torch.randn(d_sae, d)}
    state = State.of(weights | {"b_enc": torch.randn(d_sae), "b_dec": torch.randn(d)}, unit_norm=False)
    kernels, x = Triton(torch.device("cpu"), torch.float32, "bf16"), torch.randn(batch, d)
    kernels.refresh(state)
    scores = kernels.scores(x, state)
    kernels.top_k(scores, k)
    kernels.batch_top_k(scores, batch * k)
    kernels.recording = True
    kernels.positive(scores, batch * d_sae)
    # Enough entries for chunks.
    latents, values = torch.zeros(300, dtype=torch.int32), torch.rand(300)
    levels = torch.zeros(300, dtype=torch.int32)
    codes = Codes(torch.arange(batch + 1) * 60, latents, values, values, levels, (0.5, 0.5))
    decoded = kernels.decode(codes, state, x, 0.1)
    plan = kernels.invert(codes, torch.rand(300), d_sae)
    extra = Rows(torch.arange(7), torch.randn(7, d), torch.randn(7, d), torch.randn(7))
    now = Now(*(value.float() for value in Now.at(3, 1e-3, 1.0)))
    kernels.gradient_rows(state, x, decoded.gradient, plan)
    for moments in ("float32", "int8"):
        weights |= {"b_enc": state.b_enc, "b_dec": state.b_dec}
        state = State.of(weights, unit_norm=False, moments=moments)
        kernels.update_(state, now, x, decoded.gradient, plan=plan, extra=extra, pull=torch.rand(d_sae))
    kernels.aux_k(x, x, extra.encoder, extra.b_enc, extra.W_dec, k)
    kernels.reconstruct(torch.rand(batch, k), torch.zeros(batch, k, dtype=torch.int64), state.W_dec)
    launch._one[(1,)](torch.zeros(1, dtype=torch.int32), num_warps=1)
    print(*sorted(compiled))


if __name__ == "__main__":
    main()
