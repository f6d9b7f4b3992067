# Sourced by the batch scripts: sets where the ranks of this job meet. No ssh and no MPI: srun starts the ranks, and
# eve_ds reads rank and world size from what srun sets (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID).
# MASTER_ADDR and MASTER_PORT, if set, are kept. Needs SLURM_JOB_ID, SLURM_JOB_NODELIST and scontrol.

if [ -z "${MASTER_ADDR:-}" ]; then
    first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # NodeAddr is what Slurm itself reaches the node by; the node's name need not resolve from the other nodes.
    MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
    MASTER_ADDR=${MASTER_ADDR:-$first_node}
fi
# A port of the job's own, below the range (32768 and up) that the kernel hands to outgoing connections.
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export MASTER_ADDR MASTER_PORT

# One compute thread for each core of a rank; torch would otherwise start one for each core of the node, on every rank.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
