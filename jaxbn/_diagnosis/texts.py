"""Each cause in words: the problem and the remedy. Braces take the numbers of a finding."""

from typing import NamedTuple

RECALIBRATE = "compute them anew over training batches (`recalibrate`)"
CHECK_MOMENTUM = (
    "In torch's layers and the functions, momentum is the weight of the new batch (0.1). In "
    "`BatchNorm` with Flax's constructor, it is the weight of the old statistics (0.9)."
)
LARGER_BATCHES = "Use larger batches, freeze the layers, or merge the moments of several batches."


class Text(NamedTuple):
    """The two texts of a cause."""

    problem: str
    remedy: str


TEXTS = {
    "not_written_back": Text(
        "The running statistics are those before the first batch: mean 0 and variance 1.",
        'Write them back after each step: pass mutable=["batch_stats"] to `apply` and keep the '
        "updates, keep the statistics that `batch_norm` returns, or update the NNX model inside "
        "`nnx.jit`.",
    ),
    "frozen": Text(
        "The layers are frozen at mean 0 and variance 1, or have update_stats=False.",
        "Unfreeze them, or load the statistics of a trained model.",
    ),
    "not_updated": Text(
        "The layers normalize by the batch in training mode, but do not update their running "
        "statistics, which are {apart:.2g} std from the batches: update_stats is False.",
        f"Update them in training, or freeze the layers (frozen=True). Then {RECALIBRATE}.",
    ),
    "inference_in_training": Text(
        "The layers normalize by their running statistics in training mode, too.",
        "Pass use_running_average=not train, or call model.train() before training.",
    ),
    "batch_in_inference": Text(
        "The layers normalize by the batch in inference mode, so each result depends on the other "
        "samples in the batch.",
        "Pass use_running_average=not train, or call model.eval() before inference.",
    ),
    "momentum": Text(
        "The running statistics follow the newest batch, which has the weight {weight:.2g}: the "
        "momentum counts in the wrong direction.",
        CHECK_MOMENTUM,
    ),
    "momentum_of_zero": Text(
        "The running statistics are those before the first batch: the momentum gives a new batch "
        "no weight.",
        CHECK_MOMENTUM,
    ),
    "too_few_steps": Text(
        "The running statistics went {part:.0%} of the way from mean 0 and variance 1 to those of "
        "the batches: too few steps for the momentum.{steps}",
        "Train longer, give a new batch more weight, take momentum=None (the average of all "
        f"batches) in torch's layers, or {RECALIBRATE}.",
    ),
    "behind": Text(
        "The running statistics are {apart:.2g} std from those of the batches, and chance explains "
        "{chance:.2g}: the weights change faster than the statistics follow.",
        f"Train longer, let the learning rate fall to zero at the end, or {RECALIBRATE}.",
    ),
    "unlike_batches": Text(
        "The batches differ: {share:.0%} of the variance is between them, and chance explains "
        "{chance:.0%}. Causes are sorted data, or batches of one class or one source.",
        "Shuffle the samples before you make batches, on each device, too.",
    ),
    "batch_of_one": Text(
        "Training batches have one sample, whose mean and variance are not those of the data.",
        LARGER_BATCHES,
    ),
    "small_batches": Text(
        "Training batches have {samples:.0f} samples, so their means and variances are mostly "
        "noise.",
        LARGER_BATCHES,
    ),
    "small_variance": Text(
        "The running variances are {ratio:.2g} times those of the batches. The cause may be "
        "training on one sample, or on copies of few samples.",
        f"Use batches of different samples, then {RECALIBRATE}.",
    ),
    "extreme_batch": Text(
        "The running variances are {ratio:.3g} times those of the batches. The cause may be a "
        "batch with extreme values, or with values in another range.",
        f"Look for such data, then {RECALIBRATE}. `skip_nonfinite` ignores NaN and infinity.",
    ),
    "other_model": Text(
        "The running statistics belong to other weights, which were since averaged, loaded, or "
        "changed by steps that did not update the statistics. They are {apart:.2g} std from the "
        "batches.",
        f"Keep statistics and weights together, or {RECALIBRATE}.",
    ),
    "evaluation_statistics": Text(
        "The running statistics are those of the evaluation data, not of the training data.",
        "Evaluate in inference mode, and discard the updates of evaluation.",
    ),
    "epsilon": Text(
        "Variances are as small as epsilon, {epsilon:.3g}, which makes up {share:.0%} of the "
        "divisor of a layer.{behind}",
        "Use the epsilon of training: 1e-5 in torch, Flax and ONNX, 1e-3 in Keras and TensorFlow. "
        "The configuration of the model may tell.",
    ),
    "mask": Text(
        "The running statistics are those of samples and padding together, about {part:.0%} "
        "padding: training had no mask.",
        f"Pass mask= to the layers in training, then {RECALIBRATE}.",
    ),
    "mask_of_batches": Text(
        "These batches have about {part:.0%} padding, and the training data had none, or a mask.",
        "Pass mask= to the layers, or remove the padding.",
    ),
    "other_quantity": Text(
        "The running statistics hold {what}.", "Convert them where you read them."
    ),
    "other_layer": Text(
        "The running statistics are those of the layer {layer}.",
        "Check how names are matched to layers where you read the statistics.",
    ),
    "channel_order": Text(
        "The channels are in another order than in the running statistics; {channels:.0f} moved.",
        "Bring statistics, weights and input into one order, such as RGB.",
    ),
    "damaged_channels": Text(
        "{channels:.0f} channels are wrong ({which}), and all others are right.",
        f"Check how these were read or changed, or {RECALIBRATE}.",
    ),
    "input_scale": Text(
        "The input has {scale:.3g} times the scale of the data behind the running statistics.",
        "Scale pixels and features as in training: 0 to 1 or 0 to 255, divided by the same "
        "standard deviation.",
    ),
    "input_shift": Text(
        "The input is shifted against the training data: the means moved by {apart:.2g} std, and "
        "the variances stayed.",
        "Subtract the same mean as in training.",
    ),
    "variance_ratio": Text(
        "All variances are {ratio:.2g} times the running ones, and the means stayed. Causes are "
        "dropout, noise or augmentation in one mode only, another scale of the input, or variances "
        "of small groups.",
        f"Give both modes the same distribution, then {RECALIBRATE}.",
    ),
    "dropout": Text(
        "In inference mode, the input of the layers has {ratio:.2g} times the variance of training "
        "mode, though all statistics before are right. Something else acts in one mode only, such "
        "as dropout, drop path or noise.",
        f"Move dropout after the last batch norm, or {RECALIBRATE} without it.",
    ),
    "other_data": Text(
        "The evaluation data differ from the training data: they are {apart:.2g} std apart.",
        "Prepare both in the same way, and check that these training batches have all classes. If "
        "the domain is another one, adapt the statistics to it.",
    ),
    "non_finite": Text(
        "{channels:.0f} channels have NaN or infinity in their running statistics.",
        f"Find the batch that caused it (`skip_nonfinite` ignores it), and {RECALIBRATE}.",
    ),
    "negative_variance": Text(
        "{channels:.0f} channels have a negative running variance, a rounding error of "
        "E[x²] − E[x]².",
        f"Compute moments with `batch_moments`, and {RECALIBRATE}.",
    ),
    "non_finite_batches": Text(
        "{channels:.0f} channels have NaN or infinity in the batches.",
        "Look for them in the data, and for weights that diverged.",
    ),
    "half_precision": Text(
        "The running statistics are stored in {dtype}, in which small updates are lost.",
        "Store them in float32; the rest of the model may be in half precision.",
    ),
}
