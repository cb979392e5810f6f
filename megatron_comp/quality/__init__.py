# SPDX-License-Identifier: Apache-2.0
"""What a policy does to the predictions of a model, on texts and on tasks."""
