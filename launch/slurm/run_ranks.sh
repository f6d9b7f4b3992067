# shellcheck shell=bash
# Sourced by the batch scripts, which set `checkout` (the folder that holds launch/): run_ranks MODULE ARG... starts one
# rank for each task of the job, lets them meet, and has Slurm queue the job again when it was stopped after a save.
# No ssh and no MPI: eve_ds reads rank and world size from what srun sets (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID).

STOPPED_AFTER_SAVE=75 # eve_ds: saved and stopped on request; the same command goes on from there

run_ranks() {
    local module=$1
    shift
    local python=${EVE_DS_PYTHON:-$checkout/.venv/bin/python}
    if [ ! -x "$(command -v "$python")" ]; then
        echo "error: $python is no program; run make setup in $checkout, or set EVE_DS_PYTHON" >&2
        exit 2
    fi
    export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH} # the job may be submitted from any folder
    meet
    array_arguments "$@"

    # --kill-on-bad-exit: else the other ranks wait for a dead one until the time limit. --cpus-per-task: srun does not
    # take it over from sbatch since Slurm 22.05. --export: after `sbatch --export=NONE` srun would pass nothing on.
    local options=(--kill-on-bad-exit=1 --label --export=ALL)
    if ! scontrol show config | grep -q '^TaskPlugin *= task/none'; then options+=(--cpu-bind=cores); fi
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
    echo "job $SLURM_JOB_ID: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT"

    # In the background, since a shell that waits for a foreground program handles no signal. scancel and preemption
    # send SIGTERM to this shell, to srun and to the ranks; the shell only has to outlive them.
    trap : TERM USR1
    local code=0
    # shellcheck disable=SC2086
    srun "${options[@]}" ${SRUN_ARGS:-} "$python" -u -m "$module" "${arguments[@]}" &
    local job=$!
    while true; do
        code=0
        wait "$job" || code=$?
        kill -0 "$job" 2>/dev/null || break # a signal to the shell ended the wait, not srun
    done
    if [ "$code" -eq "$STOPPED_AFTER_SAVE" ]; then requeue; fi
    exit "$code"
}

# Sets MASTER_ADDR and MASTER_PORT, unless they are set, and the compute threads of a rank.
meet() {
    if [ -z "${MASTER_ADDR:-}" ]; then
        local first_node
        first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        # NodeAddr is what Slurm itself reaches the node by; the node's name need not resolve from the other nodes.
        MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
        MASTER_ADDR=${MASTER_ADDR:-$first_node}
    fi
    # A port of the job's own, below the range (32768 and up) that the kernel hands to outgoing connections.
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    # One compute thread for each core of a rank; torch would start one for each core of the node, on every rank.
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
}

# Sets `arguments`. In an array job each task is a run of its own: %a in an argument is the task's number, and an
# --output_dir without it gets a subfolder of that name.
array_arguments() {
    arguments=("$@")
    if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then return; fi
    local index folder
    for index in "${!arguments[@]}"; do
        folder=
        case ${arguments[index]} in
            --output_dir=*) folder=${arguments[index]} ;;
            *) if [ "$index" -gt 0 ] && [ "${arguments[index - 1]}" = --output_dir ]; then folder=${arguments[index]}; fi ;;
        esac
        if [ -n "$folder" ] && [[ $folder != *%a* ]]; then arguments[index]=$folder/%a; fi
        arguments[index]=${arguments[index]//%a/$SLURM_ARRAY_TASK_ID}
    done
}

# Has Slurm queue this job again, which ends this shell. Not after scancel (the job is no longer RUNNING then), nor where
# Slurm does it by itself (preemption), nor for ever.
requeue() {
    local state times=${SLURM_RESTART_COUNT:-0} most=${EVE_DS_MAX_REQUEUES:-100}
    state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *JobState=\([A-Z_]*\).*/\1/p' | head -n 1)
    if [ "$state" != RUNNING ]; then
        echo "job $SLURM_JOB_ID: saved; it is $state, so it is not queued again from here"
    elif [ "$times" -ge "$most" ]; then
        echo "job $SLURM_JOB_ID: saved; queued again $times times already (EVE_DS_MAX_REQUEUES), so submit it again" >&2
    elif trap - TERM && scontrol requeue "$SLURM_JOB_ID"; then
        echo "job $SLURM_JOB_ID: saved; queued again ($((times + 1)) of at most $most times)"
        sleep 60 # Slurm ends this shell
    else
        echo "job $SLURM_JOB_ID: saved; Slurm does not queue it again, so submit it again" >&2
    fi
}
