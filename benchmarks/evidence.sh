#!/usr/bin/env bash
# Makes README's students again, all of them, from the committed teacher: hours on a GPU, two or three days on two cores.
#   bash benchmarks/evidence.sh          then commit runs/students as benchmarks/results/DATE-students*, and python -m benchmarks.readme --write
# Each step keeps what it has finished; a killed run goes on. On processors without bfloat16: DTYPE=float32.
set -euo pipefail
cd "$(dirname "$0")/.."
students() { bash benchmarks/students.sh "$@"; }

# C, D and B_long learn from all clips, the others from 6,000.
export OUT=runs/students-half
GROUPS_OF_STUDENTS=half students corpus plans translations C D baselines select test
for SEED in 0 1 2; do SEED=$SEED students B_long; done
GROUPS_OF_STUDENTS=long students B_long_mean select test

export OUT=runs/students LIMIT=6000 STEPS_A=1800 STEPS_B=1800 STEPS_AGAIN=500
BATCH_QLORA=16 students plans translations searched B B_twice B_searched baselines
for SEED in 0 1 2; do SEED=$SEED BATCH_QLORA=32 students A; done
SEED=2 BATCH_QLORA=32 students A_fine
students A_mean A_lessons
students B_twice_fine
SEED=2 BATCH_QLORA=16 students A_searched
# What learnt from beams is measured on `select` alone.
SEED=0 GROUPS_OF_STUDENTS="quarter seeds" students select test
SEED=2 GROUPS_OF_STUDENTS=fine students select test
SEED=0 SEED_A=2 GROUPS_OF_STUDENTS=searched students select
GROUPS_OF_STUDENTS="mean head4" students select test
GROUPS_OF_STUDENTS=equal students test
# With five beams, where the teacher is a better one: B, then A, C and D.
export BATCH_TEST=160
OUT=runs/students-half BEAMS=5 GROUPS_OF_STUDENTS=long students test
mkdir -p runs/students/merged
cp -r runs/students-half/merged/B-long-mean runs/students/merged
students C_staged D_staged
SEED=2 BEAMS=5 GROUPS_OF_STUDENTS=fine students test
BEAMS=5 GROUPS_OF_STUDENTS="staged lessons" students select test
BEAMS=5 GROUPS_OF_STUDENTS=equal students test
for CODE in de zh; do cp -r "runs/students-half/test-$CODE-half" "runs/students-half/test-$CODE-long" runs/students; done
students table
