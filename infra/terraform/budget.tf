# An alarm, not a brake: it stops nothing. What stops a job is its own limit of time and workers, and the quota of GPUs.
resource "google_monitoring_notification_channel" "alarm" {
  display_name = "Braid: budget"
  type         = "email"

  labels = {
    email_address = var.alarm_email
  }

  depends_on = [google_project_service.needed]
}

resource "google_billing_budget" "monthly" {
  billing_account = var.billing_account
  display_name    = "${var.name} in ${var.project}"

  budget_filter {
    projects        = ["projects/${data.google_project.this.number}"]
    calendar_period = "MONTH"
  }

  amount {
    specified_amount {
      units = tostring(var.monthly_budget)
    }
  }

  threshold_rules {
    threshold_percent = 0.5
  }

  threshold_rules {
    threshold_percent = 0.9
  }

  threshold_rules {
    threshold_percent = 1.0
    spend_basis       = "FORECASTED_SPEND"
  }

  all_updates_rule {
    monitoring_notification_channels = [google_monitoring_notification_channel.alarm.id]
  }
}
