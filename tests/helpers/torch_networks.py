"""Networks in torch, narrow, with torchvision's module names and order of registration."""

import pytest
from helpers.flax_networks import GROWTH, LAYERS, STAGES, WIDTH

torch = pytest.importorskip("torch", reason="torch is not installed")
nn = torch.nn


def conv(inputs, outputs, size=3, stride=1, groups=1, bias=False):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)


class BasicBlock(nn.Module):
    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, channels), nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or inputs != channels:
            self.downsample = nn.Sequential(
                conv(inputs, channels, 1, stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.conv1, self.bn1 = conv(3, width, 7, 2), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = width
        for i, stride in enumerate((1, 2, 2, 2)):
            channels = width * 2**i
            blocks = BasicBlock(inputs, channels, stride), BasicBlock(channels, channels, 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inputs = channels
        self.fc = nn.Linear(inputs, 5)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def conv_norm(inputs, outputs, size=3, stride=1, groups=1):
    norm = nn.BatchNorm2d(outputs)
    return nn.Sequential(conv(inputs, outputs, size, stride, groups), norm, nn.ReLU6())


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        expand = [conv_norm(inputs, hidden, 1)] if expansion != 1 else []
        depthwise = conv_norm(hidden, hidden, 3, stride, hidden)
        project = conv(hidden, outputs, 1), nn.BatchNorm2d(outputs)
        self.conv = nn.Sequential(*expand, depthwise, *project)
        self.added = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.added else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self):
        super().__init__()
        features, inputs = [conv_norm(3, 8, 3, 2)], 8
        for expansion, outputs, blocks, stride in STAGES:
            for i in range(blocks):
                step = stride if i == 0 else 1
                features.append(InvertedResidual(inputs, outputs, step, expansion))
                inputs = outputs
        self.features = nn.Sequential(*features, conv_norm(inputs, 16, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 2 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), conv(2 * growth, growth)

    def forward(self, x):
        y = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(y)))], 1)


class DenseNet(nn.Module):
    def __init__(self, growth=GROWTH):
        super().__init__()
        self.features, channels = nn.Sequential(), 2 * growth
        self.features.add_module("conv0", conv(3, channels, 7, 2))
        self.features.add_module("norm0", nn.BatchNorm2d(channels))
        self.features.add_module("relu0", nn.ReLU())
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        for i, layers in enumerate(LAYERS, 1):
            block = nn.Sequential()
            for j in range(1, layers + 1):
                block.add_module(f"denselayer{j}", DenseLayer(channels, growth))
                channels += growth
            self.features.add_module(f"denseblock{i}", block)
            if i < len(LAYERS):
                transition = nn.Sequential()
                transition.add_module("norm", nn.BatchNorm2d(channels))
                transition.add_module("relu", nn.ReLU())
                transition.add_module("conv", conv(channels, channels // 2, 1))
                transition.add_module("pool", nn.AvgPool2d(2, 2))
                self.features.add_module(f"transition{i}", transition)
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, 5)

    def forward(self, x):
        return self.classifier(torch.relu(self.features(x)).mean((2, 3)))


def twice(inputs, outputs):
    def layers(inputs):
        return conv(inputs, outputs, bias=True), nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(*layers(inputs), *layers(outputs))


class UNet(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.enc1, self.enc2 = twice(3, width), twice(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.middle = twice(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.dec2 = twice(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.dec1 = twice(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        one = self.enc1(x)
        two = self.enc2(self.pool(one))
        x = self.up2(self.middle(self.pool(two)))
        x = self.up1(self.dec2(torch.cat([x, two], 1)))
        return self.head(self.dec1(torch.cat([x, one], 1)))
