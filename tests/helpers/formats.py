"""What several tests of the formats share."""

from __future__ import annotations

# Of (seed, step, stream, first index) the random numbers of 8 elements: 64 that every backend has.
HASHED = {
    (0, 1.0, 0, 0): ("e39dd9bf 0d32b775 7de8623a 74943290 c05dba5e 2e04acee 08041964 65a0175e"),
    (0, 1.0, 1, 0): ("7d0ef4c2 b64995da b07d413e 1e1ec842 ff3216a8 18d3f5d7 96f9edc0 6073bd20"),
    (0, 1.0, 2, 0): ("7f146286 ba1ca720 6d31125f 5e0cf895 37be522e 0f2a3f95 fed3216f 04891a44"),
    (0, 2.0, 0, 0): ("671b0bcb 28c5e87a 73b8fe60 510944b8 1226695c 14171312 82d5ace1 90d1f376"),
    (4294967295, 1.0, 0, 0): (
        "a9733793 4ca12d04 73856c09 0ca29e7d f1b3a021 301ef6dd 104ed432 b4b46819"
    ),
    (0, 16777216.0, 0, 0): (
        "c87bbf75 482a9c44 0fff2db4 1f0c48e8 3e92b3be 2ee60f17 03a5f145 bd211f21"
    ),
    (0, 1.0, 0, 4294967292): (
        "61ffa05f 58ad1916 afc08538 bd8905c9 e39dd9bf 0d32b775 7de8623a 74943290"
    ),
    (12345, 678.0, 1, 8589934683): (
        "735f9475 49b3bf8e a05f926e 7f6d3767 d21a05eb f263c9e1 ebe680b8 19bc1f73"
    ),
}
