module cloister.dev/tests/cluster/programs

go 1.26.0
