"""`python -m hyimg`, which `accelerate launch -m hyimg` needs."""

from hyimg.import_path import leave_out_working_folder

if __name__ == "__main__":
    leave_out_working_folder()

    from hyimg.cli.app import main

    main()
