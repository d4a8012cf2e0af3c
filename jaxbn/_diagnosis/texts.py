"""Each cause in words: the problem and the remedy. Braces take the numbers of a finding."""

from typing import NamedTuple

RECALIBRATE = "compute them anew over training batches (`recalibrate`)"


class Text(NamedTuple):
    """The two texts of a cause."""

    problem: str
    remedy: str


TEXTS = {
    "not_written_back": Text(
        "The running statistics are those before the first batch: mean 0 and variance 1.",
        'Write them back after each step: pass mutable=["batch_stats"] to `apply` and keep the '
        "updates, keep what `batch_norm` returns, or update the NNX model inside of `nnx.jit`.",
    ),
    "frozen": Text(
        "The layers are frozen at mean 0 and variance 1, or have update_stats=False.",
        "Unfreeze them, or load statistics of a trained model.",
    ),
    "not_updated": Text(
        "The layers normalize by the batch in training, and leave their running statistics, which "
        "are {apart:.2g} std from the batches: update_stats is False.",
        f"Update them in training, or freeze the layers (frozen=True); then {RECALIBRATE}.",
    ),
    "inference_in_training": Text(
        "The layers normalize by their running statistics in training mode too.",
        "Pass use_running_average=not train, or call model.train() before training.",
    ),
    "batch_in_inference": Text(
        "The layers normalize by the batch in inference mode: results depend on what else is in "
        "the batch.",
        "Pass use_running_average=not train, or call model.eval() before inference.",
    ),
    "momentum": Text(
        "The running statistics follow the newest batch, of which they take the part {weight:.2g}: "
        "the momentum is the wrong way round.",
        "Give torch's layers and the functions the weight of the new batch (0.1), and "
        "`BatchNorm` with Flax's constructor that of the old statistics (0.9).",
    ),
    "momentum_of_zero": Text(
        "The running statistics are those before the first batch: the momentum gives a new batch "
        "no weight.",
        "Give torch's layers and the functions the weight of the new batch (0.1), and "
        "`BatchNorm` with Flax's constructor that of the old statistics (0.9).",
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
        "The batches are not alike: {share:.0%} of the variance is between them, and chance "
        "explains {chance:.0%}. Sorted data, one class or one source in each batch, do this.",
        "Shuffle the samples before batches are made, on each device too.",
    ),
    "batch_of_one": Text(
        "Training batches have one sample: its own mean and variance are not those of the data.",
        "Take larger batches, freeze the layers, or merge moments of several batches.",
    ),
    "small_batches": Text(
        "Training batches have {samples:.0f} samples: their means and variances are mostly noise.",
        "Take larger batches, freeze the layers, or merge moments of several batches.",
    ),
    "small_variance": Text(
        "The running variances are {ratio:.2g} times those of the batches. Training on one sample, "
        "or on copies of few, does this.",
        f"Take batches of different samples, then {RECALIBRATE}.",
    ),
    "extreme_batch": Text(
        "The running variances are {ratio:.3g} times those of the batches. A batch with extreme "
        "values, or with values in another range, went in.",
        f"Look for such data, then {RECALIBRATE}. `skip_nonfinite` leaves out NaN and infinity.",
    ),
    "other_model": Text(
        "The running statistics are those of other weights: averaged or loaded since, or changed "
        "by steps that the statistics did not follow. They are {apart:.2g} std from the batches.",
        f"Keep statistics and weights together, or {RECALIBRATE}.",
    ),
    "evaluation_statistics": Text(
        "The running statistics are those of the evaluation data, not of the training data.",
        "Evaluate in inference mode, and throw away what evaluation updates.",
    ),
    "epsilon": Text(
        "Variances are as small as epsilon, {epsilon:.3g}: {share:.0%} of what a layer divides by "
        "is epsilon.{behind}",
        "Give the epsilon of training: 1e-5 in torch, Flax and ONNX, 1e-3 in Keras and "
        "TensorFlow; look into the configuration of the model.",
    ),
    "mask": Text(
        "The running statistics are those of samples and padding together, about {part:.0%} "
        "padding: the mask was left out in training.",
        f"Pass mask= to the layers in training, then {RECALIBRATE}.",
    ),
    "mask_of_batches": Text(
        "These batches have about {part:.0%} padding, and the training data had none, or a mask.",
        "Pass mask= to the layers, or take the padding away.",
    ),
    "other_quantity": Text(
        "The running statistics hold {what}.", "Convert them where they are read."
    ),
    "other_layer": Text(
        "The running statistics are those of the layer {layer}.",
        "Match names and layers anew where the statistics are read.",
    ),
    "channel_order": Text(
        "The channels are in another order than in the running statistics; {channels:.0f} moved.",
        "Bring statistics, weights and input to one order, such as RGB.",
    ),
    "damaged_channels": Text(
        "{channels:.0f} channels are wrong ({which}), and all others right.",
        f"Look at how these were read or changed, or {RECALIBRATE}.",
    ),
    "input_scale": Text(
        "The input has {scale:.3g} times the scale of the data that the running statistics are of.",
        "Scale pixels and features as in training: 0 to 1 against 0 to 255, or divided by the "
        "same standard deviation.",
    ),
    "input_shift": Text(
        "The input is shifted against the training data: the means moved by {apart:.2g} std, and "
        "the variances stayed.",
        "Subtract the same mean as in training.",
    ),
    "variance_ratio": Text(
        "All variances are {ratio:.2g} times the running ones, and the means stayed. Dropout, "
        "noise or augmentation in one mode only, another scale of the input, or variances of small "
        "groups do this.",
        f"Make both modes see the same distribution, then {RECALIBRATE}.",
    ),
    "dropout": Text(
        "The input of the layers has {ratio:.2g} times the variance of training in inference mode, "
        "though all statistics before are right: something else acts in one mode only, such as "
        "dropout, drop path or noise.",
        f"Move dropout behind the last batch norm, or {RECALIBRATE} without it.",
    ),
    "other_data": Text(
        "The evaluation data are others than the training data: they are {apart:.2g} std apart.",
        "Prepare both in the same way, and look whether these training batches have all classes. "
        "If the domain is another one, adapt the statistics to it.",
    ),
    "non_finite": Text(
        "{channels:.0f} channels have NaN or infinity in their running statistics.",
        f"Find the batch that did it (`skip_nonfinite` leaves it out), and {RECALIBRATE}.",
    ),
    "negative_variance": Text(
        "{channels:.0f} channels have a negative running variance, as E[x²] − E[x]² gives by "
        "rounding.",
        f"Compute moments by `batch_moments`, and {RECALIBRATE}.",
    ),
    "non_finite_batches": Text(
        "{channels:.0f} channels have NaN or infinity in the batches.",
        "Look for them in the data, and for weights that diverged.",
    ),
    "half_precision": Text(
        "The running statistics are kept in {dtype}, in which small updates are lost.",
        "Keep them in float32; the rest of the model may be in half precision.",
    ),
}
