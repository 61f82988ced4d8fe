"""Without a GPU the kernels run in Triton's interpreter; the variable counts only when Triton has not been imported yet."""

import os
import sys

import torch

if not torch.cuda.is_available():
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", "TRITON_INTERPRET=1 must be set before Triton's import"
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as language
    from triton.runtime import interpreter

    _original = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, scope):
        """numpy 2.4 refuses ``int()`` of a one-element array, which triton 3.6's interpreter uses for loop bounds."""
        _original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor
    _dot = interpreter.InterpreterBuilder.create_dot

    def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        """The interpreter keeps bfloat16 as raw 16-bit integers and multiplies those; widen them first."""
        a, b = (
            self.create_fp_ext(side, language.block_type(language.float32, list(side.data.shape)))
            if side.dtype.scalar == language.bfloat16
            else side
            for side in (a, b)
        )
        return _dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    interpreter.InterpreterBuilder.create_dot = _create_dot
    _call = interpreter.GridExecutor.__call__

    def _unwatched(self, *arguments, **settings):
        """Coverage reports no line of a kernel (pyproject.toml); watching the interpreter work through one takes as long as the work."""
        watching = sys.gettrace()
        sys.settrace(None)
        try:
            return _call(self, *arguments, **settings)
        finally:
            sys.settrace(watching)

    interpreter.GridExecutor.__call__ = _unwatched
