from fastvit_train.cli import main

main()
