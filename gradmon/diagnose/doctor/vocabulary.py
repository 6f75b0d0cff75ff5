"""Names of torch functions by what they do, without the underscores of in-place forms."""

from __future__ import annotations

from typing import Literal

Kind = Literal["weight", "norm", "activation", "sum", "concat", "upsample", "pass", "loss", "input", "other"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Activations that keep half of their input: He et al. 2015 initialisation goes with them.
RECTIFIERS = _names("relu relu6 leaky_relu rrelu prelu gelu silu mish elu celu hardswish softplus threshold")
#: Rectifiers with a flat half: a unit that is always there gets no gradient.
FLAT_RECTIFIERS = frozenset({"relu", "relu6", "threshold"})
SATURATING = _names("tanh sigmoid hardtanh hardsigmoid softsign")
RECURRENT = _names("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
ATTENTION = frozenset({"multi_head_attention_forward", "scaled_dot_product_attention"})
ACTIVATIONS = RECTIFIERS | SATURATING | {"selu", "glu", "softmax", "log_softmax", "tanhshrink", "logsigmoid"}
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
WEIGHTED = CONVOLUTIONS | RECURRENT | frozenset({"linear", "bilinear", "embedding", "embedding_bag"})
PRODUCTS = _names("matmul mm bmm addmm baddbmm einsum rmatmul")
NORMS = _names("batch_norm layer_norm group_norm instance_norm rms_norm normalize local_response_norm")
UPSAMPLING = TRANSPOSED | _names("interpolate upsample upsample_nearest upsample_bilinear pixel_shuffle")
CONCATS = _names("cat concat concatenate hstack column_stack")
LOSSES = _names(
    "cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss kl_div ctc_loss binary_cross_entropy"
    " binary_cross_entropy_with_logits gaussian_nll_loss poisson_nll_loss hinge_embedding_loss"
)
PASSING = _names(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout view view_as reshape flatten"
    " unflatten permute transpose swapaxes movedim contiguous squeeze unsqueeze expand clone to float half"
    " bfloat16 double type getitem get chunk split unbind narrow select pad t max_pool1d max_pool2d max_pool3d"
    " avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
    " adaptive_max_pool2d identity roll flip detach requires"
)
#: Take nothing but the shape from the tensor they are given.
CONSTANTS = _names("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty")
#: A root or a deviation among the inputs makes a product or quotient a normalisation written by hand.
DEVIATIONS = _names("rsqrt sqrt std norm vector_norm linalg_vector_norm")

_KINDS: tuple[tuple[frozenset[str], Kind], ...] = (
    (UPSAMPLING, "upsample"),
    (WEIGHTED, "weight"),
    (NORMS, "norm"),
    (ACTIVATIONS, "activation"),
    (CONCATS, "concat"),
    (LOSSES, "loss"),
    (PASSING, "pass"),
)


def kind_of(name: str) -> Kind:
    """What a function of that name does, as far as the name tells: a product or sum may be more than `other`."""
    return next((kind for names, kind in _KINDS if name in names), "other")
