cd /work/wt-study
export OMP_NUM_THREADS=1
setsid nohup .venv/bin/cola run --resume runs/001-simple_equations-20261127-153702 > /tmp/lane-1.log 2>&1 < /dev/null &
sleep 4
setsid nohup .venv/bin/cola run --resume runs/001-simple_equations-second-20261127-153705 > /tmp/lane-2.log 2>&1 < /dev/null &
