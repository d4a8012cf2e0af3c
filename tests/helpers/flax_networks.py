"""The networks of `torch_networks` in Flax, as users write them; channels last, for inference."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

import jaxbn.linen
import jaxbn.nnx

WIDTH, GROWTH = 4, 4
# Of the inverted residuals: expansion, channels, how many, stride of the first.
STAGES = ((1, 4, 1, 1), (2, 6, 2, 2), (2, 8, 5, 2), (2, 8, 2, 1), (2, 10, 1, 1))
LAYERS = (2, 11, 2)  # of each dense block

BatchNorm = functools.partial(jaxbn.linen.BatchNorm, use_running_average=True)
PADDED = {"window_shape": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}
max_pool = functools.partial(nn.max_pool, **PADDED)
halved = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))


def averaged(x):
    return x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))


def conv(features, size=3, stride=1, groups=1, bias=False, name=None):
    sizes = {"kernel_size": (size, size), "strides": stride, "padding": size // 2}
    return nn.Conv(features, **sizes, feature_group_count=groups, use_bias=bias, name=name)


def residuals():
    """Expansion, channels and stride of each."""
    for expansion, channels, blocks, stride in STAGES:
        yield from ((expansion, channels, 1 if i else stride) for i in range(blocks))


class BasicBlock(nn.Module):
    """Its shortcut has names of its own, or is one of the numbered ones, before the others."""

    channels: int
    stride: int
    shortcut_first: bool

    @nn.compact
    def __call__(self, x):
        def shortcut(x, *names):
            if x.shape[-1] == self.channels and self.stride == 1:
                return x
            conv_name, norm_name = names or (None, None)
            y = conv(self.channels, 1, self.stride, name=conv_name)(x)
            return BatchNorm(name=norm_name)(y)

        short = shortcut(x) if self.shortcut_first else None
        y = nn.relu(BatchNorm()(conv(self.channels, 3, self.stride)(x)))
        y = BatchNorm()(conv(self.channels)(y))
        return nn.relu(y + (shortcut(x, "conv_proj", "norm_proj") if short is None else short))


class ResNet18(nn.Module):
    shortcut_first: bool = False

    @nn.compact
    def __call__(self, x):
        x = max_pool(nn.relu(BatchNorm()(conv(WIDTH, 7, 2)(x))))
        for i in range(4):
            for j in range(2):
                stride = 2 if i and not j else 1
                x = BasicBlock(WIDTH * 2**i, stride, self.shortcut_first)(x)
        return nn.Dense(5)(x.mean((1, 2)))


class ConvNorm(nn.Module):
    features: int
    size: int
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        return nn.relu6(BatchNorm()(conv(self.features, self.size, self.stride, self.groups)(x)))


class InvertedResidual(nn.Module):
    expansion: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        hidden = x.shape[-1] * self.expansion
        y = ConvNorm(hidden, 1)(x) if self.expansion > 1 else x
        y = ConvNorm(hidden, 3, self.stride, hidden)(y)
        y = BatchNorm()(conv(self.features, 1)(y))
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvNorm(8, 3, 2)(x)
        for residual in residuals():
            x = InvertedResidual(*residual)(x)
        return nn.Dense(5)(ConvNorm(16, 1)(x).mean((1, 2)))


class DenseLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = conv(2 * GROWTH, 1)(nn.relu(BatchNorm()(x)))
        return jnp.concatenate([x, conv(GROWTH)(nn.relu(BatchNorm()(y)))], -1)


class Transition(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv(x.shape[-1] // 2, 1)(nn.relu(BatchNorm()(x)))
        return averaged(x)


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = max_pool(nn.relu(BatchNorm()(conv(2 * GROWTH, 7, 2)(x))))
        for i, layers in enumerate(LAYERS):
            x = Transition()(x) if i else x
            for _ in range(layers):
                x = DenseLayer()(x)
        return nn.Dense(5)(nn.relu(BatchNorm()(x)).mean((1, 2)))


class Twice(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(BatchNorm()(conv(self.features, bias=True)(x)))
        return x


def up(features, name=None):
    return nn.ConvTranspose(features, (2, 2), (2, 2), padding=((1, 1), (1, 1)), name=name)


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        one = Twice(WIDTH)(x)
        two = Twice(2 * WIDTH)(halved(one))
        x = Twice(4 * WIDTH)(halved(two))
        x = Twice(2 * WIDTH)(jnp.concatenate([up(2 * WIDTH)(x), two], -1))
        x = Twice(WIDTH)(jnp.concatenate([up(WIDTH)(x), one], -1))
        return nn.Conv(2, (1, 1))(x)


class NamedUNet(nn.Module):
    """With the names of torch, but for a list."""

    def setup(self):
        def twice(features):
            first = conv(features, bias=True), BatchNorm(), nn.relu
            return nn.Sequential([*first, conv(features, bias=True), BatchNorm(), nn.relu])

        self.enc1, self.enc2, self.middle = twice(WIDTH), twice(2 * WIDTH), twice(4 * WIDTH)
        self.up = [up(2 * WIDTH), up(WIDTH)]
        self.dec2, self.dec1, self.head = twice(2 * WIDTH), twice(WIDTH), nn.Conv(2, (1, 1))

    def __call__(self, x):
        one = self.enc1(x)
        two = self.enc2(halved(one))
        x = self.up[0](self.middle(halved(two)))
        x = self.up[1](self.dec2(jnp.concatenate([x, two], -1)))
        return self.head(self.dec1(jnp.concatenate([x, one], -1)))


def nnx_conv(inputs, features, size=3, stride=1, groups=1, bias=False):
    sizes = {"kernel_size": (size, size), "strides": stride, "padding": size // 2}
    groups = {"feature_group_count": groups, "use_bias": bias}
    return nnx.Conv(inputs, features, **sizes, **groups, rngs=nnx.Rngs(0))


def nnx_norm(features):
    return jaxbn.nnx.BatchNorm(features, use_running_average=True, rngs=nnx.Rngs(0))


class NnxBasicBlock(nnx.Module):
    def __init__(self, inputs, channels, stride):
        self.conv1, self.bn1 = nnx_conv(inputs, channels, 3, stride), nnx_norm(channels)
        self.conv2, self.bn2 = nnx_conv(channels, channels), nnx_norm(channels)
        self.projects = inputs != channels
        if self.projects:
            self.shortcut_conv = nnx_conv(inputs, channels, 1, stride)
            self.shortcut_bn = nnx_norm(channels)

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        return nnx.relu(y + (self.shortcut_bn(self.shortcut_conv(x)) if self.projects else x))


class NnxResNet18(nnx.Module):
    def __init__(self):
        self.stem, self.stem_norm = nnx_conv(3, WIDTH, 7, 2), nnx_norm(WIDTH)
        self.blocks, inputs = nnx.List([]), WIDTH
        for channels in (WIDTH, 2 * WIDTH, 4 * WIDTH, 8 * WIDTH):
            self.blocks.append(NnxBasicBlock(inputs, channels, 1 if inputs == channels else 2))
            self.blocks.append(NnxBasicBlock(channels, channels, 1))
            inputs = channels
        self.head = nnx.Linear(8 * WIDTH, 5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = max_pool(nnx.relu(self.stem_norm(self.stem(x))))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def nnx_conv_norm(inputs, features, size, stride=1, groups=1):
    norm = nnx_norm(features)
    return nnx.Sequential(nnx_conv(inputs, features, size, stride, groups), norm, nnx.relu6)


class NnxInvertedResidual(nnx.Module):
    def __init__(self, inputs, expansion, features, stride):
        hidden, self.added = inputs * expansion, stride == 1 and inputs == features
        expand = [nnx_conv_norm(inputs, hidden, 1)] if expansion > 1 else []
        depthwise = nnx_conv_norm(hidden, hidden, 3, stride, hidden)
        project = nnx_conv(hidden, features, 1), nnx_norm(features)
        self.layers = nnx.List([*expand, depthwise, *project])

    def __call__(self, x):
        y = x
        for layer in self.layers:
            y = layer(y)
        return x + y if self.added else y


class NnxMobileNetV2(nnx.Module):
    def __init__(self):
        self.blocks, inputs = nnx.List([]), 8
        for expansion, features, stride in residuals():
            self.blocks.append(NnxInvertedResidual(inputs, expansion, features, stride))
            inputs = features
        self.first, self.last = nnx_conv_norm(3, 8, 3, 2), nnx_conv_norm(inputs, 16, 1)
        self.classifier = nnx.Linear(16, 5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.last(x).mean((1, 2)))


class NnxDenseLayer(nnx.Module):
    def __init__(self, inputs):
        self.norm1, self.norm2 = nnx_norm(inputs), nnx_norm(2 * GROWTH)
        self.conv1, self.conv2 = nnx_conv(inputs, 2 * GROWTH, 1), nnx_conv(2 * GROWTH, GROWTH)

    def __call__(self, x):
        y = self.conv1(nnx.relu(self.norm1(x)))
        return jnp.concatenate([x, self.conv2(nnx.relu(self.norm2(y)))], -1)


class NnxTransition(nnx.Module):
    def __init__(self, inputs):
        self.norm, self.conv = nnx_norm(inputs), nnx_conv(inputs, inputs // 2, 1)

    def __call__(self, x):
        return averaged(self.conv(nnx.relu(self.norm(x))))


class NnxDenseNet(nnx.Module):
    def __init__(self):
        channels = 2 * GROWTH
        self.conv, self.norm = nnx_conv(3, channels, 7, 2), nnx_norm(channels)
        self.body = nnx.List([])
        for i, layers in enumerate(LAYERS):
            if i:
                self.body.append(NnxTransition(channels))
                channels //= 2
            for j in range(layers):
                self.body.append(NnxDenseLayer(channels + j * GROWTH))
            channels += layers * GROWTH
        self.last_norm = nnx_norm(channels)
        self.fc = nnx.Linear(channels, 5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = max_pool(nnx.relu(self.norm(self.conv(x))))
        for layer in self.body:
            x = layer(x)
        return self.fc(nnx.relu(self.last_norm(x)).mean((1, 2)))


def nnx_twice(inputs, outputs):
    first = nnx_conv(inputs, outputs, bias=True), nnx_norm(outputs), nnx.relu
    second = nnx_conv(outputs, outputs, bias=True), nnx_norm(outputs), nnx.relu
    return nnx.Sequential(*first, *second)


def nnx_up(inputs, outputs):
    options = {"strides": (2, 2), "padding": ((1, 1), (1, 1)), "rngs": nnx.Rngs(0)}
    return nnx.ConvTranspose(inputs, outputs, (2, 2), **options)


class NnxUNet(nnx.Module):
    """Its lists are in other orders than torch's modules."""

    def __init__(self):
        w = WIDTH
        self.down = nnx.List([nnx_twice(3, w), nnx_twice(w, 2 * w), nnx_twice(2 * w, 4 * w)])
        self.up = nnx.List([nnx_up(4 * w, 2 * w), nnx_up(2 * w, w)])
        self.dec = nnx.List([nnx_twice(4 * w, 2 * w), nnx_twice(2 * w, w)])
        self.out = nnx_conv(w, 2, 1, bias=True)

    def __call__(self, x):
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else halved(x))
            skips.append(x)
        for rise, block, skip in zip(self.up, self.dec, skips[1::-1], strict=True):
            x = block(jnp.concatenate([rise(x), skip], -1))
        return self.out(x)
