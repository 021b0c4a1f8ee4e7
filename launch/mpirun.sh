#!/bin/sh
# Starts ranks with mpirun and knows the dialects of Open MPI and MPICH (Intel MPI and Cray speak MPICH's).
#
#   launch/mpirun.sh -n 4 python -m distllm generate demo --prompt "Once" -tp 2 -pp 2
#   launch/mpirun.sh -n 16 --hostfile hostfiles/openmpi.example python -m distllm …
#
# MPIRUN names another mpirun than the first on PATH. With fewer cores than ranks, waiting ranks yield their core.
set -eu

usage() { echo "usage: launch/mpirun.sh -n RANKS [--hostfile FILE] COMMAND …" >&2; exit 2; }

ranks= hostfile=
while [ $# -gt 0 ]; do
    case $1 in
        -n) ranks=${2:?"-n needs a number"}; shift 2 ;;
        --hostfile) hostfile=${2:?"--hostfile needs a file"}; shift 2 ;;
        -*) usage ;;
        *) break ;;
    esac
done
[ -n "$ranks" ] && [ $# -gt 0 ] || usage

mpirun=${MPIRUN:-mpirun}
version=$("$mpirun" --version 2>&1) || { echo "mpirun.sh: cannot run '$mpirun'; install distllm[openmpi]" >&2; exit 2; }
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

case $version in
    *"Open MPI"*)
        set -- -x OMP_NUM_THREADS --bind-to none "$@"
        [ -z "${DISTLLM_TIMEOUT_S:-}" ] || set -- -x DISTLLM_TIMEOUT_S "$@"
        [ -z "$hostfile" ] || set -- --hostfile "$hostfile" "$@"
        [ "$(id -u)" -ne 0 ] || set -- --allow-run-as-root "$@"
        if [ -z "$hostfile" ] && [ "$ranks" -gt "$cores" ]; then
            set -- --oversubscribe --mca mpi_yield_when_idle 1 "$@"
        fi
        # Open MPI 4 does not start without ssh, even on one host, where it needs none.
        if [ -z "$hostfile" ] && ! command -v ssh >/dev/null && ! command -v rsh >/dev/null; then
            export OMPI_MCA_plm="${OMPI_MCA_plm:-^rsh}"
        fi
        ;;
    *)
        [ -z "$hostfile" ] || set -- -f "$hostfile" "$@"
        ;;
esac
exec "$mpirun" -n "$ranks" "$@"
