# SPDX-License-Identifier: Apache-2.0


def load_checkpoint(*_, **__):
    """The weights stay as they are."""
