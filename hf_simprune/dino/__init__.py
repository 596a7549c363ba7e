# SPDX-License-Identifier: Apache-2.0
"""How a backbone is trained without labels: DINO with tokens leaving both branches in lockstep."""
