#!/bin/bash
# One run on several nodes, a process for each GPU, from the root of the repository:
#
#     sbatch launch/slurm.sh --config=experiments/ladder.py:1b --workdir=/shared/runs/1b --config.mesh.fsdp=8 \
#         --config.mesh.expert=2 --config.evaluation.batch_size=16
#
# The words behind the script are those of `python -m research.main`; --nodes, --time and what else your cluster asks
# for go before it, and change what stands here. The mesh is as large as nodes x GPUs; the workdir is on a disk that all
# nodes share. The processes find each other by what Slurm tells each of them. `make .venv-gpu/ready` makes the
# environment; PYTHON names another interpreter, MODULE another command that several processes share: research.distill.

#SBATCH --job-name=parsimony
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGTERM to all processes five minutes before the time is up: they save, and leave with 143.
#SBATCH --signal=TERM@300

code=0
# The processes end each other, in half a minute at most; srun would send SIGTERM, and 1 would look like 143.
srun --kill-on-bad-exit=0 "${PYTHON:-.venv-gpu/bin/python}" -m "${MODULE:-research.main}" "$@" || code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"  # goes on where it was saved, when it is given time again
fi
exit "$code"
