# SPDX-License-Identifier: Apache-2.0
"""What travels between ranks: number formats, message layout, codecs and compressed collectives. Knows torch only."""
