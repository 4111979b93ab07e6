"""What measures attention kernels: named cases, peers, the gate that no wrong kernel passes, timing, reports.

cases, timing, results <- prepared, report <- flex, gate <- peers <- runner <- quick (`python -m longgen_kernels bench`)

`bench/` of a checkout adds the commands and the files of record; docs/benchmarks.md says what is counted.
"""
