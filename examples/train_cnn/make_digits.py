"""Writes `digits.npz` from scikit-learn's copy of the UCI optical digits.

The repository has the file already. To write it again, run `pip install scikit-learn==1.9.1` first.
"""

import pathlib

import numpy as np
from sklearn.datasets import load_digits

CREDIT = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning "
    "Repository, 1998 (CC BY 4.0), https://doi.org/10.24432/C50P49; the 1797 images of 8 x 8 "
    "pixels, values 0 to 16, that scikit-learn 1.9.1 (BSD-3) distributes, in a shuffled split."
)
TEST_SIZE = 360

images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8).astype(np.uint8)
order = np.random.RandomState(0).permutation(len(images))
test, train = order[:TEST_SIZE], order[TEST_SIZE:]
np.savez_compressed(
    pathlib.Path(__file__).with_name("digits.npz"),
    x_train=images[train],
    y_train=labels[train].astype(np.uint8),
    x_test=images[test],
    y_test=labels[test].astype(np.uint8),
    credit=CREDIT,
)
