"""Every matrix of the model, but for the embedding and those of experts and routers."""

from jaxtyping import Float
from torch import Tensor, nn

from gemmascope import ops


class Linear(nn.Linear):
    """Without a bias, in the dtype that the machine multiplies fastest, rounded once."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_out"]:
        return ops.linear(x, self.weight)
